"""The models that complete texts, by the names that clients use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from onnxsplit.errors import InputError, shown
from runtime.gateway.errors import NotLoaded, UnknownModel
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import Version
from runtime.gateway.openai.errors import FieldError
from runtime.gateway.openai.objects import ModelObject
from runtime.pipeline import Pipeline
from runtime.text.text import Text


class ServedText(NamedTuple):
    """A model that completes texts now.

    Attributes:
        name: as clients call it.
        version: the version that does it.
        pipeline: its pipeline.
        text: its text.
    """

    name: str
    version: Version
    pipeline: Pipeline
    text: Text

    @property
    def length(self) -> int:
        """The most tokens of a sequence, prompt included."""
        assert self.pipeline.max_length is not None, "it has a decoder"
        return self.pipeline.max_length

    @property
    def ends(self) -> tuple[int, ...]:
        """The model's own end tokens."""
        assert self.pipeline.plan.decoder is not None, "its text would be None"
        return self.pipeline.plan.decoder.end_tokens


class Catalogue:
    """Finds the version that completes texts for a name. Every model whose plan has a decoder and a tokenizer is there.

    Args:
        repository: the models.
        names: what clients call the only model; without any, models have their own names.

    Raises:
        InputError: there are names, and not exactly one model with a decoder and a tokenizer; or a name is unusable.
    """

    def __init__(self, repository: Repository, names: Sequence[str] = ()) -> None:
        self._repository = repository
        own = list(dict.fromkeys(version.model for version in repository if version.has_text))
        if names and len(own) != 1:
            raise InputError(
                f"--served-model-name names one model, but {len(own)} of the plans have a decoder and a tokenizer"
            )
        for name in names:
            if not name.strip() or not name.isprintable():
                raise InputError(f"--served-model-name {name!r} cannot be used; give a name of printable characters")
        self._models = dict.fromkeys(names, own[0]) if names else {name: name for name in own}
        self._created = int(time.time())

    @property
    def names(self) -> tuple[str, ...]:
        """All names, also of models that are not loaded."""
        return tuple(self._models)

    def models(self) -> list[ModelObject]:
        """The models that complete texts now."""
        found = []
        for name, model in self._models.items():
            version = self._repository.find(model)
            if version.text is not None and version.pipeline is not None:
                length = ServedText(name, version, version.pipeline, version.text).length
                found.append(ModelObject(name, self._created, length))
        return found

    def model(self, name: str) -> ModelObject:
        """One of them.

        Raises:
            UnknownModel, NotLoaded: as :meth:`find`.
        """
        return ModelObject(name, self._created, self.find(name).length)

    def find(self, name: str | None) -> ServedText:
        """The model for a request. It may leave the name out where there is only one.

        Raises:
            FieldError: there are several, and none is named.
            UnknownModel: there is no such model.
            NotLoaded: it completes no texts now; the message says why.
        """
        if name is None and len(self._models) > 1:
            raise FieldError("model", f"model is missing; this server has {', '.join(self._models)}")
        if name is None and self._models:
            name = self.names[0]
        if name not in self._models:
            raise self._unknown(name)
        version = self._repository.loaded(self._models[name])
        if version.text is None or version.pipeline is None:
            raise NotLoaded(f"model {name!r} completes no texts: {version.text_problem or version.reason}")
        return ServedText(name, version, version.pipeline, version.text)

    def _unknown(self, name: str | None) -> UnknownModel:
        if not self._models:
            return UnknownModel("no model of this server has a decoder and a tokenizer, so none completes texts")
        return UnknownModel(f"model {shown(name)} does not exist; this server has {', '.join(self._models)}")
