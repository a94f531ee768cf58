"""Every stored case through its adapter."""

import harness


def test_golden(golden_case):
    slug, stem = golden_case
    if slug is None:
        raise harness.CaseError(f"no golden case of a known system below {stem}")
    harness.run(slug, stem)
