"""The annotator's model behind an OpenAI-compatible endpoint: many chunks at a time, outcomes as they come."""

from __future__ import annotations

from collections.abc import Iterator

from thinkmid.augment.annotators import AnnotatorConfig, Outcome, Reply, Unanswered, by_model
from thinkmid.augment.config import EndpointConfig
from thinkmid.augment.pool import through_pool
from thinkmid.augment.shards import Piece
from thinkmid.errors import UserError
from thinkmid.rollout.endpoint import Endpoint, EndpointError
from thinkmid.run.interrupt import Interrupt

PROBE = "Reply with the word yes."  # an endpoint that rejects this too is not put off by a chunk


class EndpointAnnotator:
    """Thoughts by a model behind an endpoint. Call close() in the end."""

    def __init__(self, cfg: AnnotatorConfig, endpoint: EndpointConfig, interrupt: Interrupt):
        self._cfg, self._config, self._interrupt = cfg, endpoint, interrupt
        self._answered = False
        self._body = {"temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
        self.endpoint = Endpoint(
            endpoint.url, endpoint.model, endpoint.key_env, timeout_s=endpoint.timeout_s, retries=endpoint.retries
        )
        self.model: dict[str, str] = {}
        self.patience = 2 * endpoint.workers + 8

    def close(self) -> None:
        """Cancels what is on its way, which then has no response."""
        self.endpoint.close()

    def outcomes(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Outcome]]:
        """Pieces with what became of them; once interrupted, those that were on their way."""
        return through_pool(pieces, self.annotate, self._config.workers, self._interrupt, self.close)

    def facts(self) -> dict[str, object]:
        """For the report: tries that failed, by reason."""
        return {"endpoint_failures": dict(self.endpoint.failures)}

    def annotate(self, chunk: str) -> Outcome:
        return by_model(chunk, self._cfg, self.write)

    def write(self, prompt: str) -> Reply:
        """The reply. Unanswered after the last try; UserError if the endpoint rejects whatever it is asked."""
        try:
            return self._reply(prompt)
        except EndpointError as error:
            if not error.is_final:
                raise Unanswered(str(error), error.said) from None
            rejection = error
        # of the key, the address or the model, unless it did answer with these
        if (self._answered or rejection.status not in (401, 403, 404)) and self._answers():
            return Reply(rejection.said, fault=str(rejection))
        said = f": {rejection.said}" if rejection.said else ""
        raise UserError(f"endpoint.url {self._config.url} answers {rejection} for model {self._config.model!r}{said}")

    def _answers(self) -> bool:
        """Whether a short question with the same settings is accepted."""
        try:
            self._reply(PROBE)
        except EndpointError as error:
            if error.is_final:
                return False
            raise Unanswered(str(error), error.said) from None
        return True

    def _reply(self, prompt: str) -> Reply:
        written = self.endpoint.submit(self.endpoint.complete(prompt, **self._body)).result()
        self._answered = True
        return Reply(written.text, written.prompt_tokens, written.written_tokens, cut=written.cut)
