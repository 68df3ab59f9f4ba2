"""What every gRPC role shares: errors, channels, the server's life, translation to and from the wire.

Stands below all roles and knows none of them; protobuf objects stop here and in ``coordinator/servicer.py``.
"""
