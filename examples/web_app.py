"""What restart_web_server.py has its servers serve: the pid of who answers, as ASGI and as WSGI."""

import os


async def asgi(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"%d" % os.getpid()})


def wsgi(environment, start_response):
    start_response("200 OK", [])
    return [b"%d" % os.getpid()]
