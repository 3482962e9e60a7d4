from support import Raw
def test_smoke(target):
    def strike(address):
        with Raw(address) as raw:
            raw.send_bytes(b"\xc1")
            raw.is_refused(60)
    target.attack(strike, why="no msgpack array")
