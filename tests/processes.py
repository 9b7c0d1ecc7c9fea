"Processes that know of each other as those of torchrun do, forked, so that they need not import anything"
import multiprocessing, os, socket, sys, time, warnings
import torch

def free_port():
    with socket.socket() as s: s.bind(('', 0)); return s.getsockname()[1]

def in_processes(n, f, *args):
    "Call `f` in `n` processes; what they are, and where to read what they say"
    port,fork,reads = free_port(),multiprocessing.get_context('fork'),[]
    def one(rank, w):
        os.dup2(w, 1); os.dup2(w, 2)
        sys.stdout,sys.stderr = (os.fdopen(os.dup(w), 'w', buffering=1) for _ in range(2))
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR='localhost', MASTER_PORT=str(port))
        torch.set_num_threads(1)
        warnings.showwarning = lambda said, *args: print(said, file=sys.stderr) # pytest would collect it
        f(*args, rank)
    ps = []
    for rank in range(n):
        r,w = os.pipe()
        ps.append(fork.Process(target=one, args=(rank,w)))
        ps[-1].start(); os.close(w); reads.append(r)
    return ps,reads

def ended(ps, reads, timeout=60):
    "Exit codes and what was said, once all have ended"
    end = time.monotonic()+timeout
    for p in ps: p.join(max(.1, end-time.monotonic()))
    stuck = [p for p in ps if p.is_alive()]
    for p in stuck: p.kill()
    said = []
    for r in reads:
        with os.fdopen(r) as o: said.append(o.read())
    assert not stuck, said
    return [p.exitcode for p in ps],said

def all_well(n, f, *args):
    "Call `f` in `n` processes that end well; what they say"
    codes,said = ended(*in_processes(n, f, *args))
    assert codes==[0]*n, '\n'.join(said)
    return said
