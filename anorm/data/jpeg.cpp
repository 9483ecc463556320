// A region of a JPEG, decoded alone: what lies outside it is read, for its Huffman codes, but not transformed, upsampled
// or converted. The pixels are those of decoding the whole.
//
// Only clean files of common kinds are answered for. Everything else returns false, and the caller decodes the whole
// image by its usual way, which knows what is wrong with it.

#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or newer is wanted: faults of jpeg_skip_scanlines were mended up to 2.0.6"
#endif

namespace {

struct Errors {
  jpeg_error_mgr base;  // first, so that libjpeg's pointer to it is a pointer to this
  std::jmp_buf exit;
};

void leave(j_common_ptr jpeg) { std::longjmp(reinterpret_cast<Errors*>(jpeg->err)->exit, 1); }

// Damaged data is only warned of, and made up for: here it ends the attempt as an error does.
void note(j_common_ptr jpeg, int level) {
  if (level < 0) leave(jpeg);
}

// 8 bits, grey or colour, which convert to RGB; and not cut off, which a region above the cut would never notice.
bool read_header(jpeg_decompress_struct& jpeg, const unsigned char* data, std::size_t bytes) {
  if (bytes < 4 || data[bytes - 2] != 0xFF || data[bytes - 1] != JPEG_EOI) return false;
  jpeg_mem_src(&jpeg, data, bytes);
  jpeg_read_header(&jpeg, TRUE);
  const bool colours = jpeg.jpeg_color_space == JCS_GRAYSCALE || jpeg.jpeg_color_space == JCS_YCbCr ||
                       jpeg.jpeg_color_space == JCS_RGB;
  return colours && jpeg.data_precision == 8;
}

// Fancy upsampling weighs a pixel's colour with that of its neighbours, so the region is decoded with a few more around
// it: at its own border the library would do as at an image's.
constexpr int kMargin = 4;

// The scans of a progressive file all came. Where some did not, the library smooths over blocks, farther than kMargin.
bool complete(const jpeg_decompress_struct& jpeg) {
  if (jpeg.coef_bits == nullptr) return true;
  for (int component = 0; component < jpeg.num_components; ++component)
    for (int bits : jpeg.coef_bits[component])
      if (bits != 0) return false;
  return true;
}

bool read_region(jpeg_decompress_struct& jpeg, int top, int left, int height, int width, unsigned char* out) {
  jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&jpeg);
  if (!complete(jpeg)) return false;
  const int right = left + width + kMargin, whole = static_cast<int>(jpeg.output_width);
  JDIMENSION first = left > kMargin ? left - kMargin : 0;
  JDIMENSION columns = (right < whole ? right : whole) - first;
  if (columns < jpeg.output_width) jpeg_crop_scanline(&jpeg, &first, &columns);  // first moves left to a block's edge
  if (top) jpeg_skip_scanlines(&jpeg, top);
  JSAMPARRAY row =
      jpeg.mem->alloc_sarray(reinterpret_cast<j_common_ptr>(&jpeg), JPOOL_IMAGE, jpeg.output_width * 3, 1);
  for (int y = 0; y < height; ++y, out += 3 * static_cast<std::size_t>(width)) {
    jpeg_read_scanlines(&jpeg, row, 1);
    std::memcpy(out, row[0] + 3 * (left - static_cast<int>(first)), 3 * static_cast<std::size_t>(width));
  }
  return true;
}

// Whether use(jpeg) came to its end and said true.
template <typename Use>
bool attempt(const Use& use) {
  jpeg_decompress_struct jpeg{};
  Errors errors;
  jpeg.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.emit_message = note;
  volatile bool done = false;
  if (!setjmp(errors.exit)) {
    jpeg_create_decompress(&jpeg);  // refuses a library of another version than the header
    done = use(jpeg);
  }
  jpeg_destroy_decompress(&jpeg);
  return done;
}

}  // namespace

// size[0], size[1]: height and width of the image.
extern "C" bool anorm_jpeg_size(const unsigned char* data, std::size_t bytes, int* size) {
  return attempt([&](jpeg_decompress_struct& jpeg) {
    if (!read_header(jpeg, data, bytes)) return false;
    size[0] = jpeg.image_height, size[1] = jpeg.image_width;
    return true;
  });
}

// region[0 .. 3]: top, left, height, width, inside the image. out: height x width x 3, RGB.
extern "C" bool anorm_jpeg_region(const unsigned char* data, std::size_t bytes, const int* region,
                                  unsigned char* out) {
  return attempt([&](jpeg_decompress_struct& jpeg) {
    if (!read_header(jpeg, data, bytes)) return false;
    return read_region(jpeg, region[0], region[1], region[2], region[3], out);
  });
}
