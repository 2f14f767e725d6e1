// Image files of the user.

/**
 * Open an image file: {file, name, url, width, height, isOpaque}.
 * Throws an Error for the user if the browser cannot show it.
 */
export async function open(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(image.src);
    throw new Error(`${file.name} is not an image that this browser can show. Use a PNG, JPEG or WebP file.`);
  }
  const { src: url, naturalWidth: width, naturalHeight: height } = image;
  return { file, name: file.name, url, width, height, isOpaque: isOpaque(image) };
}

const SAMPLE_SIDE = 256;

/** Return whether no pixel is transparent, at a small size. */
function isOpaque(image) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.min(side, SAMPLE_SIDE) || 1);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return pen.getImageData(0, 0, canvas.width, canvas.height).data.every((value, i) => i % 4 !== 3 || value === 255);
}

/** Return a file as a data URL. Throws an Error for the user. */
export const dataUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read. Check that the file still exists.`));
    reader.readAsDataURL(file);
  });

/** Save a Blob as a file of the user. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
