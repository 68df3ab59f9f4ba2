"""Translation between ``speculation.messages`` and the wire: what the frames of both workers are made of.

Decoding never raises on odd values: whoever receives a message checks them. Of a proposal's lists no more is read than
a valid one may have, and one too many of what would make it invalid: a drafter is not trusted, and a list of millions
takes seconds. An unknown error code reads as INTERNAL.
"""

from __future__ import annotations

from collections.abc import Mapping

from protos import common_pb2
from speculation.draft_distribution import MAX_DRAFT_TOP_N, DraftDistribution
from speculation.messages import (
    MAX_PROPOSAL_TOKENS,
    ChatTemplate,
    CloseSession,
    Grammar,
    Method,
    ModelInfo,
    Proposal,
    Sampling,
    SessionError,
    SessionErrorCode,
    TokenLogprobs,
)

_METHOD_TO_PROTO: Mapping[Method, common_pb2.Method.ValueType] = {
    Method.COUPLED: common_pb2.COUPLED,
    Method.REJECTION: common_pb2.REJECTION,
    Method.BLOCK: common_pb2.BLOCK,
}
_METHOD_FROM_PROTO: Mapping[int, Method] = {value: key for key, value in _METHOD_TO_PROTO.items()}


def sampling_to_proto(sampling: Sampling) -> common_pb2.Sampling:
    grammar = sampling.grammar
    return common_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        method=_METHOD_TO_PROTO[sampling.method],
        draft_top_n=sampling.draft_top_n,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=[common_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        bad_words=[common_pb2.TokenSequence(token_ids=token_ids) for token_ids in sampling.bad_words],
        min_length=sampling.min_length,
        prompt_length=sampling.prompt_length,
        grammar=None if grammar is None else common_pb2.Grammar(kind=grammar.kind, text=grammar.text),
    )


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    grammar = Grammar(message.grammar.kind, message.grammar.text) if message.HasField("grammar") else None
    return Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        method=_METHOD_FROM_PROTO.get(message.method, Method.UNKNOWN),
        draft_top_n=message.draft_top_n,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,  # a peer that does not know it sends 0
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
        bad_words=tuple(tuple(item.token_ids) for item in message.bad_words),
        min_length=message.min_length,
        prompt_length=message.prompt_length,
        grammar=grammar,
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_proto(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)))


def model_info_to_proto(info: ModelInfo) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        name=info.name,
        vocab_size=info.vocab_size,
        max_context=info.max_context,
        eos_token_ids=info.eos_token_ids,
        num_parameters=info.num_parameters,
        dtype=info.dtype,
        device=info.device,
        tokenizer_sha256=info.tokenizer_sha256,
        tokenizer_size=info.tokenizer_size,
        chat_template=_chat_template_to_proto(info.chat_template),
    )


def model_info_from_proto(message: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        vocab_size=message.vocab_size,
        max_context=message.max_context,
        eos_token_ids=tuple(message.eos_token_ids),
        num_parameters=message.num_parameters,
        dtype=message.dtype,
        device=message.device,
        tokenizer_sha256=message.tokenizer_sha256,
        tokenizer_size=message.tokenizer_size,
        chat_template=_chat_template_from_proto(message.chat_template) if message.HasField("chat_template") else None,
    )


def _chat_template_to_proto(template: ChatTemplate | None) -> common_pb2.ChatTemplate | None:
    if template is None:
        return None
    return common_pb2.ChatTemplate(source=template.source, special_tokens=dict(template.special_tokens))


def _chat_template_from_proto(message: common_pb2.ChatTemplate) -> ChatTemplate:
    return ChatTemplate(message.source, tuple(sorted(message.special_tokens.items())))


def fill_proposal(message: common_pb2.Proposal, proposal: Proposal) -> None:
    """Writes ``proposal`` into an empty message of a frame: one made outside would be copied into it.

    Raises ValueError on values that do not fit the wire's integers.
    """
    message.prefix_length = proposal.prefix_length
    message.prefix_fingerprint = proposal.prefix_fingerprint
    message.token_ids.extend(proposal.token_ids)
    message.confidences.extend(proposal.confidences)
    message.is_branch = proposal.is_branch
    message.num_committed = proposal.num_committed
    message.held_s = proposal.held_s
    for distribution in proposal.distributions:
        message.distributions.add(token_ids=distribution.token_ids, weights=distribution.weights)


def proposal_from_proto(message: common_pb2.Proposal) -> Proposal:
    return Proposal(
        message.prefix_length,
        message.prefix_fingerprint,
        tuple(message.token_ids[: MAX_PROPOSAL_TOKENS + 1]),
        tuple(message.confidences[:MAX_PROPOSAL_TOKENS]),
        message.is_branch,
        _distributions_from_proto(message) if message.distributions else (),  # mostly there are none
        message.num_committed,
        message.held_s,
    )


def _distributions_from_proto(message: common_pb2.Proposal) -> tuple[DraftDistribution, ...]:
    return tuple(
        DraftDistribution(
            tuple(distribution.token_ids[: MAX_DRAFT_TOP_N + 1]), tuple(distribution.weights[: MAX_DRAFT_TOP_N + 1])
        )
        for distribution in message.distributions[:MAX_PROPOSAL_TOKENS]
    )


_ERROR_CODES: Mapping[int, SessionErrorCode] = {
    common_pb2.SessionError.Code.Value(code.value): code for code in SessionErrorCode
}


def error_to_proto(error: SessionError) -> common_pb2.SessionError:
    return common_pb2.SessionError(code=common_pb2.SessionError.Code.Value(error.code.value), message=error.message)


def error_from_proto(message: common_pb2.SessionError) -> SessionError:
    return SessionError(_ERROR_CODES.get(message.code, SessionErrorCode.INTERNAL), message.message)


CLOSE = CloseSession()
CLOSE_PROTO = common_pb2.CloseSession()
