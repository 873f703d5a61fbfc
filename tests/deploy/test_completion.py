"""What a finished completion cost, as people read it."""

from __future__ import annotations

from switchyard_client import RequestStats

from deploy.completion import Completion, summary


def test_drafts_are_summed_up_where_there_were_any() -> None:
    plain = Completion("p", num_output_tokens=20)
    assert not any("draft" in line for line in summary(plain))
    drafted = Completion("p", stats=RequestStats(num_drafts=8, num_draft_tokens=24, num_accepted_tokens=12))
    assert "draft tokens          12 of 24 accepted; 2.50 tokens a step with drafts" in summary(drafted)
