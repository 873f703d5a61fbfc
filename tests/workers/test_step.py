"""A plan survives its wire form."""

import numpy as np

from workers.step import BlockTransfer, SampleSpec, ScheduledRequest, SchedulerOutput, decode_plan, encode_plan


def test_round_trip():
    sample = SampleSpec(0.5, 0.25, 40, 2**64 - 3, 17)
    names = [bytes(range(16)), bytes(range(240, 256))]
    plan = SchedulerOutput(
        requests=[
            ScheduledRequest("", [5, 6, 7], 10, 12, [3, 1, 4], None),
            ScheduledRequest("", [9], 40, 40, [2], sample),
        ],
        loads=[BlockTransfer("", names, [7, 8], [16, 3])],
        stores=[BlockTransfer("", names[:1], [0], [16]), BlockTransfer("", names[1:], [1], [2])],
        write_backs=[BlockTransfer("", names, [3, 4], [16, 16])],
    )
    assert decode_plan(encode_plan(plan)) == plan


def test_empty_plan():
    words = encode_plan(SchedulerOutput())
    assert words.dtype == np.int32
    assert decode_plan(words).is_empty
