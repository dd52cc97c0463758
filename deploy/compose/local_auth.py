"""Keys for `docker-compose.yml`: two teams, and a key without one, and no database.

For a LiteLLM on one's own machine. A real one looks its keys up in its database, and needs none
of this.
"""

from __future__ import annotations

from fastapi import Request
from litellm.proxy._types import ProxyException, UserAPIKeyAuth

_TEAMS = {"sk-red": "Team Red", "sk-blue": "Team Blue", "sk-alone": None}


async def authenticate(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Say whose key this is; called by LiteLLM for every request."""
    if api_key not in _TEAMS:
        raise ProxyException("unknown key", type="auth_error", param="key", code=401)
    team = _TEAMS[api_key]
    return UserAPIKeyAuth(api_key=api_key, team_id=team, team_alias=team)
