"""Functions with right and wrong names, for shape_suffixes_test."""


def swapped(x_BT):
  y_TB = x_BT  # a forgotten transpose
  return y_TB.sum()


def good(x_BT):
  y_TB = x_BT.T
  total = y_TB.sum()
  mask_B11T = x_BT[:, None, None, :]
  return total + mask_B11T.sum()


def reduced(x_B):
  sum_B = x_B.sum()
  return sum_B


def pair(x_B2):
  return x_B2


def captured(x_BT):
  y_B = x_BT  # wrong, and a cell variable

  def inner():
    return y_B

  return inner()


def stores(x_BT, into):
  y_B = x_BT
  into.append(y_B)


def returns_early(x_BT):
  y_B = x_BT
  if len(y_B):
    return
  raise ValueError


short = lambda x_B: x_B  # noqa: E731


def refuse(x_BT):
  raise ValueError("rank")


def free(B, x_1):
  x_b, LIMIT, y_BT = B, x_1, None
  return x_b, LIMIT, y_BT
