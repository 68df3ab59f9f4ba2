"""The HTTP front door: OpenAI's API over `Coordinator.generate`, a translation layer like `coordinator.servicer`.

`app` puts the parts together, `server` is its life on a port. A request's way through: a body (`bodies`) becomes a
`GenerateRequest` (`translation`), its events (`choices`) become an answer in one of two shapes (`shapes`), whole or as
a stream (`answers`). Whatever goes wrong becomes OpenAI's error body in `errors` and nowhere else.
"""
