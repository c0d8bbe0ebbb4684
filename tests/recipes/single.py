import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

cuda = torch.cuda.is_available()
device = torch.device("cuda" if cuda else "cpu")
datasets.MNIST("data", download=True)
data = datasets.MNIST("data", transform=transforms.ToTensor())
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
model.to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loader = DataLoader(data, batch_size=64, shuffle=True)
for epoch in range(3):
    loss_sum = torch.zeros((), device=device)
    for images, labels in loader:
        logits = model(images.to(device))
        loss = nn.functional.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach()
    print(f"epoch {epoch}: loss {loss_sum.item() / len(loader):.3f}")
    torch.save(model.state_dict(), "model.pt")
