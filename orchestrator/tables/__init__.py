"""Attribution, agreement, scores and reliability: pure functions of values, Arrow out."""
