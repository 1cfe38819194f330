"""The report of preflight's ring: transports from NCCL's log, and the slowest rank."""

from pgenrm_train.backends.ray.ring import Measured, report, transports_in

LOG = """
node1:71:104 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
node1:71:104 [0] NCCL INFO Channel 01/0 : 7[7] -> 8[0] [send] via NET/IB/0/GDRDMA
node1:71:104 [0] NCCL INFO Channel 02/0 : 7[7] -> 8[0] [send] via NET/Socket/0
node1:71:104 [0] NCCL INFO Channel 00 : 1[1] -> 0[0] via SHM/direct/direct
node1:71:104 [0] NCCL INFO Connected all rings
"""


def test_the_transport_is_read_from_the_log_of_nccl():
    assert transports_in(LOG) == {"P2P", "NET/IB", "NET/Socket", "SHM"}


def test_the_report_names_all_transports_and_the_slowest_rank():
    ranks = [Measured(True, 310.5, {"P2P"}), Measured(True, 48.2, {"NET/IB"})]
    assert report("nccl", ranks) == "ring: 2 processes (nccl via NET/IB, P2P), 48.20 GB/s"
