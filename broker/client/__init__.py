"""The client library and transfer engine; it knows the HTTP contract and nothing of the broker behind it.

::

    async with Broker("https://broker.example") as broker:
        await download(broker, blob, Path("disk.qcow2"))
"""
