"""Plan a step before it runs, see it refused under a budget that is too small, then train with it."""

import brim
from brim import data, nn, optim

train, test = data.load_digits()
brim.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_step(x: brim.Tensor, y: brim.Tensor) -> brim.Tensor:
    """Forward, backward, update: ordinary eager code."""
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


plan = brim.plan(train_step, brim.spec((64, 1, 8, 8)), brim.spec((64,), "int64"))
print(plan)
print("the peak is at", plan.peak_at)
print("largest batch in 1 MiB:", plan.largest_batch("1MiB"))

try:
    brim.compile(train_step, budget=plan.peak_bytes - 1)(brim.zeros((64, 1, 8, 8)), brim.zeros(64, dtype="int64"))
except brim.BudgetExceeded as refused:
    print(refused)

step = brim.compile(train_step, budget="1MiB")
for epoch in range(3):
    for x, y in data.DataLoader(train, batch_size=64, shuffle=True):
        loss = step(x, y)
    print(f"epoch {epoch + 1}  loss of the last batch {loss.item():.4f}")
print(step.explain())

predict = brim.compile(model.eval())
for x, y in data.DataLoader(test, batch_size=len(test)):
    print(f"test accuracy {(predict(x).argmax(axis=1) == y).astype('float32').mean().item():.3f}")
