"""Keys for `docker-compose.yml`: teams to try it with, those of the traffic, and no database.

For a LiteLLM on one's own machine. A real one looks its keys up in its database, and needs none
of this.
"""

from __future__ import annotations

from fastapi import Request
from litellm.proxy._types import ProxyException, UserAPIKeyAuth

_TEAMS = {
    "sk-red": "Team Red",
    "sk-blue": "Team Blue",
    "sk-alone": None,
    # Those with which sidecar/demo/traffic.py makes its calls.
    "sk-demo-search": "search",
    "sk-demo-data-science": "data science",
    "sk-demo-loner": None,
}


async def authenticate(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Say whose key this is; called by LiteLLM for every request."""
    if api_key not in _TEAMS:
        raise ProxyException("unknown key", type="auth_error", param="key", code=401)
    team = _TEAMS[api_key]
    return UserAPIKeyAuth(api_key=api_key, team_id=team, team_alias=team)
