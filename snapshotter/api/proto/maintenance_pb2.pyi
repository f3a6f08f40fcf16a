from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CheckRequest(_message.Message):
    __slots__ = ("repair", "bytes_per_second", "blocks_only")
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ONLY_FIELD_NUMBER: _ClassVar[int]
    repair: bool
    bytes_per_second: int
    blocks_only: bool
    def __init__(self, repair: bool = ..., bytes_per_second: _Optional[int] = ..., blocks_only: bool = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("what", "problem", "outcome", "advice")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    what: str
    problem: str
    outcome: str
    advice: str
    def __init__(self, what: _Optional[str] = ..., problem: _Optional[str] = ..., outcome: _Optional[str] = ..., advice: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class CheckEvent(_message.Message):
    __slots__ = ("finding", "progress")
    FINDING_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    finding: Finding
    progress: Progress
    def __init__(self, finding: _Optional[_Union[Finding, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("everything",)
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    everything: bool
    def __init__(self, everything: bool = ...) -> None: ...

class CollectResponse(_message.Message):
    __slots__ = ("layers", "size_bytes")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    layers: int
    size_bytes: int
    def __init__(self, layers: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: _struct_pb2.Struct
    def __init__(self, status: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: str
    def __init__(self, previous: _Optional[str] = ...) -> None: ...
