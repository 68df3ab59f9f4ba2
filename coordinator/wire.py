"""Translation between ``generation.proto`` and the coordinator's own requests and events."""

from __future__ import annotations

from coordinator.coordinator import Deployment
from coordinator.events import FinishedEvent, GenerateEvent, StartedEvent, TokenPiece, TokensEvent
from coordinator.requests import GenerateRequest, SpeculationOptions
from coordinator.traffic import Traffic
from protos import generation_pb2
from rpc.errors import InvalidRequest, OutriderError
from rpc.shared_codec import logprobs_to_proto
from speculation.messages import Grammar, TokenId


def request_from_proto(message: generation_pb2.GenerateRequest) -> GenerateRequest:
    """Unset fields become None, an unset prompt an empty one; nothing is checked here."""
    return GenerateRequest(
        prompt=tuple(message.tokens.ids) if message.WhichOneof("prompt") == "tokens" else message.text,
        model=message.model,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        top_p=message.top_p if message.HasField("top_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        speculation=_options_from_proto(message.speculation),
        min_p=message.min_p if message.HasField("min_p") else None,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else None,
        presence_penalty=message.presence_penalty if message.HasField("presence_penalty") else None,
        frequency_penalty=message.frequency_penalty if message.HasField("frequency_penalty") else None,
        logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
        bad_words=tuple(message.bad_words),
        min_tokens=message.min_tokens if message.HasField("min_tokens") else None,
        n=message.n if message.HasField("n") else None,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        logprobs_mode=message.logprobs_mode,
        stop=tuple(message.stop),
        include_stop_str_in_output=message.include_stop_str_in_output,
        structured_output=_grammar_from_proto(message.structured_output)
        if message.HasField("structured_output")
        else None,
    )


def _grammar_from_proto(message: generation_pb2.StructuredOutput) -> Grammar:
    """A message that says nothing becomes a grammar of no kind."""
    match message.WhichOneof("form"):
        case "json_schema":
            return Grammar("json_schema", message.json_schema)
        case "regex":
            return Grammar("regex", message.regex)
        case "grammar":
            return Grammar("ebnf", message.grammar)
        case "json_object" if message.json_object:
            return Grammar("json_object", "")
        case _:
            return Grammar("", "")


def _options_from_proto(message: generation_pb2.SpeculationOptions) -> SpeculationOptions:
    return SpeculationOptions(
        disabled=message.disabled,
        policy=message.policy,
        k=message.k if message.HasField("k") else None,
        lookahead=message.lookahead if message.HasField("lookahead") else None,
        turns=message.turns,
        method=message.method,
        draft_top_n=message.draft_top_n if message.HasField("draft_top_n") else None,
    )


def event_to_proto(event: GenerateEvent) -> generation_pb2.GenerateEvent:
    match event:
        case TokensEvent():
            return generation_pb2.GenerateEvent(tokens=_tokens_to_proto(event), choice=event.choice)
        case StartedEvent():
            return generation_pb2.GenerateEvent(started=_started_to_proto(event))
        case FinishedEvent():
            return generation_pb2.GenerateEvent(finished=_finished_to_proto(event), choice=event.choice)


def tagged_event_to_proto(tag: str, event: GenerateEvent) -> generation_pb2.GenerateManyEvent:
    match event:
        case TokensEvent():
            return generation_pb2.GenerateManyEvent(tag=tag, tokens=_tokens_to_proto(event), choice=event.choice)
        case StartedEvent():
            return generation_pb2.GenerateManyEvent(tag=tag, started=_started_to_proto(event))
        case FinishedEvent():
            return generation_pb2.GenerateManyEvent(tag=tag, finished=_finished_to_proto(event), choice=event.choice)


def failed_to_proto(tag: str, error: OutriderError) -> generation_pb2.GenerateManyEvent:
    field = error.violations[0].field if isinstance(error, InvalidRequest) and error.violations else ""
    failed = generation_pb2.Failed(code=error.grpc_code.name, message=error.message, field=field)
    return generation_pb2.GenerateManyEvent(tag=tag, failed=failed)


def _started_to_proto(event: StartedEvent) -> generation_pb2.Started:
    return generation_pb2.Started(
        request_id=event.request_id,
        model=event.model,
        prompt_tokens=event.num_prompt_tokens,
        seed=event.seed,
        prompt_logprobs=[logprobs_to_proto(item) for item in event.prompt_logprobs],
    )


def _tokens_to_proto(event: TokensEvent) -> generation_pb2.Tokens:
    tokens = [_token_to_proto(piece) for piece in event.tokens]
    return generation_pb2.Tokens(
        text=event.text,
        tokens=tokens,
        num_drafted=event.num_drafted,
        k=event.k,
        num_looked_up=event.num_looked_up,
    )


def _token_to_proto(piece: TokenPiece) -> generation_pb2.Token:
    token = generation_pb2.Token(id=piece.token_id, text=piece.text, drafted=piece.drafted, looked_up=piece.looked_up)
    if piece.logprobs is not None:
        token.logprob = piece.logprobs.logprob
        token.top_logprobs.extend(
            generation_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in piece.logprobs.top
        )
    return token


def _finished_to_proto(event: FinishedEvent) -> generation_pb2.Finished:
    return generation_pb2.Finished(
        finish_reason=event.finish_reason.value,
        usage=generation_pb2.Usage(
            prompt_tokens=event.num_prompt_tokens, completion_tokens=event.num_completion_tokens
        ),
        speculation=_stats_to_proto(event),
        timing=generation_pb2.Timing(
            queue_s=event.timing.queue_s, first_token_s=event.timing.first_token_s, total_s=event.timing.total_s
        ),
        stop_reason=_stop_reason_to_proto(event.stop_reason),
    )


def _stop_reason_to_proto(reason: str | TokenId | None) -> generation_pb2.StopReason | None:
    if reason is None:
        return None
    if isinstance(reason, str):
        return generation_pb2.StopReason(text=reason)
    return generation_pb2.StopReason(token_id=reason)


def _stats_to_proto(event: FinishedEvent) -> generation_pb2.SpeculationStats:
    stats = event.stats
    return generation_pb2.SpeculationStats(
        num_steps=stats.num_steps,
        num_free_run_steps=stats.num_free_run_steps,
        num_drafted=stats.num_drafted,
        num_accepted=stats.num_accepted,
        num_proposed=stats.num_proposed,
        num_dropped=stats.num_dropped,
        acceptance_rate=stats.acceptance_rate,
        mean_acceptance_length=stats.mean_acceptance_length,
        mean_k=stats.mean_k,
        last_k=stats.last_k,
        num_draft_losses=stats.num_draft_losses,
        num_target_losses=stats.num_target_losses,
        policy=event.policy,
        num_misses=stats.num_misses,
        num_caught=stats.num_caught,
        q_bytes_received=stats.q_bytes_received,
        q_bytes_relayed=stats.q_bytes_relayed,
        steps_by_accepted=stats.steps_by_accepted,
        num_wasted=stats.num_wasted,
        estimated_speedup=event.estimated_speedup,
        num_looked_up=stats.num_looked_up,
        num_looked_up_accepted=stats.num_looked_up_accepted,
    )


def deployment_to_proto(deployment: Deployment) -> generation_pb2.ServedModel:
    return generation_pb2.ServedModel(
        name=deployment.model.name,
        vocab_size=deployment.model.vocab_size,
        max_context=deployment.model.max_context,
        eos_token_ids=deployment.model.eos_token_ids,
        draft_models=deployment.draft_models,
        num_targets=deployment.num_targets,
        num_drafters=deployment.num_drafters,
        policy=deployment.policy,
        max_k=deployment.max_k,
        traffic=_traffic_to_proto(deployment.traffic),
    )


def _traffic_to_proto(traffic: Traffic) -> generation_pb2.Traffic:
    return generation_pb2.Traffic(
        num_target_steps=traffic.num_target_steps,
        num_frames_to_targets=traffic.target.num_sent,
        num_frames_from_targets=traffic.target.num_received,
        num_frames_to_drafters=traffic.draft.num_sent,
        num_frames_from_drafters=traffic.draft.num_received,
    )
