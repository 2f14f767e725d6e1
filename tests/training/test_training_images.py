"""Image changes of the training of the embedded model."""

from __future__ import annotations

import torch
from training import images


def make_disc(side: int = 128, radius: int = 32, color: tuple[float, ...] = (1.0, 0.0, 0.0)):
    """Return a disc of one colour, (1, 4, side, side)."""
    axis = torch.arange(side) - side / 2 + 0.5
    inside = (axis[:, None] ** 2 + axis[None] ** 2).sqrt() < radius
    rgb = torch.tensor(color)[:, None, None].expand(3, side, side) * inside
    return torch.cat([rgb, inside[None].float()])[None]


def test_recolor_changes_main_hue_only() -> None:
    rgba = make_disc()
    rgba[0, :3, 60:68, 60:68] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    changed = images.recolor(rgba, 0.0, 2 / 3)
    torch.testing.assert_close(changed[0, :3, 64, 64], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(changed[0, :3, 64, 44], torch.tensor([0.0, 0.0, 1.0]))


def test_main_hue_of_red_disc_is_red() -> None:
    hue = images.main_hue(make_disc())
    assert hue is not None
    assert min(hue, 1 - hue) < 0.05


def test_main_hue_of_grey_disc_is_none() -> None:
    assert images.main_hue(make_disc(color=(0.5, 0.5, 0.5))) is None


def test_hsv_round_trip_returns_rgb() -> None:
    rgb = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images.hsv_to_rgb(images.rgb_to_hsv(rgb)), rgb)


def test_outline_has_its_width_and_color() -> None:
    outlined = images.add_outline(make_disc(), 8, 1.0)
    row = outlined[0, :, 64]
    assert row[3, 64 - 32 - 7] > 0.99
    assert row[3, 64 - 32 - 11] == 0
    torch.testing.assert_close(row[:3, 64 - 32 - 5], torch.ones(3))
    torch.testing.assert_close(row[:3, 64], torch.tensor([1.0, 0.0, 0.0]))


def test_glow_ends_at_its_radius() -> None:
    glowing = images.add_glow(make_disc(), 20, 0.9)
    row = glowing[0, 3, 64]
    assert 0 < row[64 - 32 - 10] < 1
    assert row[64 - 32 - 22] == 0


def test_thin_image_has_one_opacity_beside_a_line() -> None:
    rgba = make_disc().expand(8, -1, -1, -1)
    thinned = images.thin(rgba, torch.Generator().manual_seed(0))
    torch.testing.assert_close(thinned[:, :3], rgba[:, :3])
    for image in thinned:
        values = set(image[3].unique().tolist()) - {0.0, 1.0}
        assert len(values) <= 1
        assert all(0.1 <= value <= 0.9 for value in values)
    assert (thinned[:, 3] < rgba[:, 3]).any()


def test_pixelate_has_hard_alpha_and_plain_cells() -> None:
    rgba = make_disc()
    cells = images.pixelate(rgba, cells=16).unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
    assert set(cells[0, 3].unique().tolist()) == {0.0, 1.0}
    assert (cells == cells[..., :1]).all()


def test_move_keeps_border_empty() -> None:
    rgba = make_disc(radius=58)
    moved = images.move(rgba.repeat(16, 1, 1, 1), torch.Generator().manual_seed(1))
    assert moved[:, 3].amax((1, 2)).min() > 0.99
    corners = moved[:, 3][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() == 0
