"""zuko, imported so that torch stays as it was: zuko switches off the validation of every distribution."""

from torch.distributions import Distribution

_before = Distribution._validate_args

import zuko  # noqa: E402

Distribution.set_default_validate_args(_before)

__all__ = ["zuko"]
