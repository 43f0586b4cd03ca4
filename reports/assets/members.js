// Ensembles: what the viewer shows of several masks or maps of one scan. Functions of arrays alone, without the page.
const members = (() => {
  "use strict";

  // A NIfTI file on another grid, with the header of a file of ours: of masks, 0 everywhere, or of `bytes` a voxel with
  // the type and scaling of that file.
  const emptyFile = (buffer, shape, affine, bytes) => {
    const file = new ArrayBuffer(352 + (bytes || 1) * shape[0] * shape[1] * shape[2]);
    new Uint8Array(file).set(new Uint8Array(buffer, 0, 352));
    const header = new DataView(file);
    [3, ...shape, 1].forEach((size, i) => header.setInt16(40 + 2 * i, size, true));
    [0, 1, 2].forEach((axis) => {
      header.setFloat32(80 + 4 * axis, Math.hypot(...affine.slice(0, 3).map((row) => row[axis])), true);
      affine[axis].forEach((value, i) => header.setFloat32(280 + 16 * axis + 4 * i, value, true));
    });
    if (!bytes) {
      header.setInt16(70, 2, true);
      header.setInt16(72, 8, true);
      header.setFloat32(112, 1, true);
      header.setFloat32(116, 0, true);
    }
    return file;
  };

  // Of each voxel, how many of the masks mark it.
  const countMarks = (all, frames) => {
    const size = all.length / frames;
    const counts = new Uint16Array(size);
    for (let i = 0; i < all.length; i++) counts[i % size] += all[i] ? 1 : 0;
    return counts;
  };

  // Of each voxel, how many masks have their outline there, within the slices along `axis`. A pixel of a picture
  // becomes `factor` x `factor`, so that outlines are thin.
  const drawOutlines = (all, shape, frames, axis, factor) => {
    const [width, height, depth] = shape;
    const size = width * height * depth;
    const wide = width * factor;
    const counts = new Uint8Array(size * factor * factor);
    const steps = [1, width, width * height];
    const across = [0, 1, 2].filter((one) => one !== axis);
    const edge = Math.max(1, Math.round(factor / 5));
    const drawn = new Int32Array(counts.length).fill(-1);
    for (let frame = 0; frame < frames; frame++) {
      for (let i = 0; i < size; i++) {
        if (!all[frame * size + i]) continue;
        const place = [i % width, Math.floor(i / width) % height, Math.floor(i / (width * height))];
        for (const one of across) {
          for (const side of [-1, 1]) {
            const next = place[one] + side;
            if (next >= 0 && next < shape[one] && all[frame * size + i + side * steps[one]]) continue;
            // The strip of the pixel along this side.
            const from = [0, 0], to = [factor, factor];
            if (factor > 1) {
              if (side < 0) to[one] = edge; else from[one] = factor - edge;
            }
            for (let y = from[1]; y < to[1]; y++) {
              for (let x = from[0]; x < to[0]; x++) {
                const there = place[0] * factor + x + wide * (place[1] * factor + y + height * factor * place[2]);
                if (drawn[there] !== frame) counts[there] += 1;
                drawn[there] = frame;
              }
            }
          }
        }
      }
    }
    return counts;
  };

  // The affine of a grid whose first two axes have `factor` times as many voxels.
  const refine = (affine, factor) => affine.map((row) => {
    const shift = (1 / factor - 1) / 2;
    return [row[0] / factor, row[1] / factor, row[2], row[3] + (row[0] + row[1]) * shift];
  });

  // A picture on that grid, each of its pixels `factor` x `factor`.
  const refineFile = (buffer, levels, shape, affine, factor) => {
    const [width, height, depth] = shape;
    const [wide, high] = [width * factor, height * factor];
    const file = emptyFile(buffer, [wide, high, depth], affine, levels.BYTES_PER_ELEMENT);
    const fine = new levels.constructor(file, 352);
    for (let i = 0; i < fine.length; i++) {
      const x = Math.floor(i % wide / factor), y = Math.floor(Math.floor(i / wide) % high / factor);
      fine[i] = levels[x + width * (y + height * Math.floor(i / (wide * high)))];
    }
    return file;
  };

  return { emptyFile, refineFile, countMarks, drawOutlines, refine };
})();
