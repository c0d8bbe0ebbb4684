import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, transforms

cuda = torch.cuda.is_available()
local_rank = int(os.environ["LOCAL_RANK"])  # Step 1; torchrun sets it.
device = torch.device(f"cuda:{local_rank}" if cuda else "cpu")
dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
if local_rank == 0:  # Step 2: all at once would damage the files.
    datasets.MNIST("data", download=True)
dist.barrier()  # Each rank waits for all others here.
data = datasets.MNIST("data", transform=transforms.ToTensor())
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
ddp = nn.parallel.DistributedDataParallel(model.to(device))  # Step 3: equal weights.
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
sampler = DistributedSampler(data)  # Step 4: each rank's share, shuffled.
loader = DataLoader(data, batch_size=64, sampler=sampler)
for epoch in range(3):
    sampler.set_epoch(epoch)  # Step 5: without it, all epochs have one order.
    loss_sum = torch.zeros((), device=device)
    for images, labels in loader:
        logits = ddp(images.to(device))
        loss = nn.functional.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # This also averages the gradients over the ranks.
        optimizer.step()
        loss_sum += loss.detach()
    dist.all_reduce(loss_sum)  # Step 6: until here, each rank knows its own.
    if dist.get_rank() == 0:  # Step 7.
        batches = len(loader) * dist.get_world_size()
        print(f"epoch {epoch}: loss {loss_sum.item() / batches:.3f}")
        torch.save(model.state_dict(), "model.pt")  # The model itself, not `ddp`.
dist.destroy_process_group()
