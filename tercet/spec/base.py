"""What the parts of a spec are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free port
Positive = Annotated[int, Field(ge=1, le=2**62)]  # what foreign code counts with has 63 bits
Text = Annotated[str, Field(min_length=1)]
Host = Annotated[Text, AfterValidator(lambda host: host.removeprefix("[").removesuffix("]"))]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
