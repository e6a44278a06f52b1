from my_policy import MassRate

from kvpolicy.testing import check_policy


def test_it_keeps_every_invariant():
    check_policy(MassRate())
