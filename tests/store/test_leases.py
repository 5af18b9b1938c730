from audience_sync.store import engines, leases


def test_a_lease_is_taken_once(engine):
    with engines.write(engine) as connection:
        lease = leases.acquire(connection, "x", 60)
    assert isinstance(lease, leases.Lease)
