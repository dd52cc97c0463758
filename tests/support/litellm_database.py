"""Keys, users and teams for a real LiteLLM, without a database server.

LiteLLM reaches its database through a client whose engine is a program that has to be fetched
from elsewhere. Here only the tables behind that client are replaced: who may ask for what, and
what is answered, is LiteLLM's own code in full, its authentication and its endpoints.

Contract: the tables are one JSON file, which LiteLLM's side reads anew at each query; a test
changes it while LiteLLM runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.litellm import LiteLLM

__all__ = ["VIEWER", "Database", "KeyedLiteLLM"]

VIEWER = "sk-viewer-1"
"""A key that may look all others up; whoever uses the shared rig leaves it as it is."""

_MODULE = '''\
import json
import pathlib

from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy import _types, proxy_server
from litellm.proxy.auth import user_api_key_auth

_FILE = pathlib.Path(__file__).with_name("database.json")
_MODELS = {
    "litellm_verificationtoken": _types.LiteLLM_VerificationToken,
    "litellm_usertable": _types.LiteLLM_UserTable,
    "litellm_teamtable": _types.LiteLLM_TeamTable,
}


class _Anything:
    """Whatever else is asked of a database: it does nothing and finds nothing."""

    async def __call__(self, *args, **kwargs):
        return None

    def __getattr__(self, name):
        return _Anything()


class _Table(_Anything):
    def __init__(self, name):
        self._name = name

    def _rows(self, where):
        rows = json.loads(_FILE.read_text()).get(self._name, [])
        return [row for row in rows if all(row.get(key) == where[key] for key in where or {})]

    async def find_unique(self, where, **kwargs):
        rows = self._rows(where)
        return _MODELS[self._name](**rows[0]) if rows else None

    find_first = find_unique

    async def find_many(self, where=None, skip=0, take=None, **kwargs):
        model = _MODELS.get(self._name)
        rows = self._rows(where)[skip:]
        return [model(**row) for row in rows[:take]] if model else []

    async def count(self, where=None, **kwargs):
        return len(self._rows(where))

    async def group_by(self, *args, **kwargs):
        return []


class _Tables:
    def __getattr__(self, name):
        return _Table(name)


class _Client(_Anything):
    db = _Tables()

    async def get_data(self, token=None, table_name=None, **kwargs):
        if table_name != "combined_view":
            return None
        key = await self.db.litellm_verificationtoken.find_unique({"token": token})
        if key is None:
            return None
        team = await self.db.litellm_teamtable.find_unique({"team_id": key.team_id})
        alias = team.team_alias if team else None
        return _types.LiteLLM_VerificationTokenView(**key.model_dump(), team_alias=alias)


_build = user_api_key_auth._user_api_key_auth_builder


async def _build_with_database(*args, **kwargs):
    proxy_server.prisma_client = _Client()
    return await _build(*args, **kwargs)


user_api_key_auth._user_api_key_auth_builder = _build_with_database
installed = CustomLogger()
'''


class Database:
    """The tables of one LiteLLM, empty at first.

    Args:
        directory: that of the LiteLLM.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tables: dict[str, dict[str, dict[str, Any]]] = {
            "litellm_verificationtoken": {},
            "litellm_usertable": {},
            "litellm_teamtable": {},
        }
        (directory / "rig_database.py").write_text(_MODULE)
        self._write()

    def put_key(self, key: str, **row: Any) -> None:
        """Make a key, or change one."""
        hashed = hashlib.sha256(key.encode()).hexdigest()
        known = {"token": hashed, "key_name": "sk-…", "models": []}
        self._put("litellm_verificationtoken", hashed, known | row)

    def put_user(self, user_id: str, role: str) -> None:
        """Make a user with a role."""
        row = {"user_id": user_id, "user_role": role, "max_budget": None, "user_email": None}
        self._put("litellm_usertable", user_id, row)

    def put_team(self, team_id: str, alias: str | None) -> None:
        """Make a team, or rename one."""
        lists: dict[str, Any] = {"models": [], "members_with_roles": []}
        self._put("litellm_teamtable", team_id, lists | {"team_id": team_id, "team_alias": alias})

    def _put(self, table: str, identity: str, row: dict[str, Any]) -> None:
        self._tables[table][identity] = row
        self._write()

    def _write(self) -> None:
        path = self._directory / "database.json"
        fresh = path.with_suffix(".new")
        tables = {name: list(rows.values()) for name, rows in self._tables.items()}
        fresh.write_text(json.dumps(tables))
        os.replace(fresh, path)


@dataclass(frozen=True, slots=True)
class KeyedLiteLLM:
    """A LiteLLM that looks keys up, and its tables."""

    litellm: LiteLLM
    database: Database
