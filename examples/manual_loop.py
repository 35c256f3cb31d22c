"""The training loop by hand: loader, forward pass, backward pass, step."""

import brim
from brim import data, nn, optim

train, test = data.load_digits()
brim.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = data.DataLoader(train, batch_size=64, shuffle=True)
for epoch in range(3):
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}  loss of the last batch {loss.item():.4f}")

with brim.no_grad():
    for x, y in data.DataLoader(test, batch_size=len(test)):
        print(f"test accuracy {(model(x).argmax(axis=1) == y).astype('float32').mean().item():.3f}")
