"""A pytest plugin: ``pytest --kvpolicy my_package.my_module:MyPolicy`` checks a policy.

One test for each invariant, beside the tests that there are; ``-m kvpolicy`` leaves the others out.

It is a package of its own because pytest loads plugins at every start, and importing anything of
``kvpolicy`` imports torch: without the option, this module adds three options and imports nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvpolicy import EvictionPolicy
    from kvpolicy.testing import Invariant

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("kvpolicy", "invariants of KV-cache eviction policies")
    group.addoption(
        "--kvpolicy",
        metavar="POLICY",
        action="append",
        default=[],
        help="check this policy, one test an invariant: my_package.my_module:MyPolicy, or a name "
        "in kvpolicy's registry; repeatable",
    )
    group.addoption(
        "--kvpolicy-set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a parameter of the policies, e.g. recent_lines=1; repeatable",
    )
    group.addoption(
        "--kvpolicy-examples",
        metavar="N",
        type=int,
        default=50,
        help="streams that each invariant is tried on (default: 50)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Say what the mark of these tests means."""
    config.addinivalue_line("markers", "kvpolicy: an invariant of a policy named by --kvpolicy")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Add the tests before others select among them."""
    if config.option.kvpolicy:  # modules of the user's own
        sys.path.insert(0, str(config.invocation_params.dir))
    for name in config.option.kvpolicy:
        items.extend(PolicyChecks.from_parent(session, name=name).collect())
    return (yield)


class PolicyChecks(pytest.Collector):
    """One policy: a test for each invariant that applies to it."""

    def collect(self) -> list[PolicyCheck]:
        """Make the policy and its tests.

        Raises:
            UsageError: there is no such policy, or a parameter is wrong.
        """
        from kvpolicy import KVPolicyError
        from kvpolicy.testing import applicable, policy_named

        try:
            policy = policy_named(self.name, self.config.option.kvpolicy_set)
        except KVPolicyError as error:
            raise pytest.UsageError(f"--kvpolicy {self.name}: {error}") from error
        return [
            PolicyCheck.from_parent(
                self, name=invariant.name.replace(" ", "_"), policy=policy, invariant=invariant
            )
            for invariant in applicable(policy)
        ]


class PolicyCheck(pytest.Item):
    """One invariant of one policy."""

    def __init__(self, *, policy: EvictionPolicy, invariant: Invariant, **named: Any) -> None:
        super().__init__(**named)
        self.add_marker("kvpolicy")
        self.policy = policy
        self.invariant = invariant

    def runtest(self) -> None:
        """Try generated streams; shrink the one that shows a violation."""
        from kvpolicy.testing import check_policy

        examples = self.config.option.kvpolicy_examples
        check_policy(self.policy, examples=examples, invariants=[self.invariant.name])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What the policy did, without the machinery's traceback."""
        from kvpolicy.testing import PolicyCheckError

        if isinstance(excinfo.value, PolicyCheckError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """Where pytest says that the test is."""
        assert self.parent is not None
        return self.parent.name, None, f"{self.parent.name}: {self.invariant.name}"
