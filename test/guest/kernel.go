package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"
)

// Vmlinux returns the ELF kernel inside a bzImage, which boots without
// unpacking itself: under software emulation that is half of the boot. A
// kernel that is no bzImage comes back as it is.
//
// Offsets: Linux, Documentation/arch/x86/boot.rst.
func Vmlinux(ctx context.Context, image []byte) ([]byte, error) {
	if len(image) < 0x250 || string(image[0x202:0x206]) != "HdrS" {
		return image, nil
	}
	setup := (int64(image[0x1f1]) + 1) * 512
	start := setup + int64(binary.LittleEndian.Uint32(image[0x248:]))
	end := start + int64(binary.LittleEndian.Uint32(image[0x24c:]))
	if start >= end || end > int64(len(image)) {
		return nil, errors.New("the kernel's payload is outside its file")
	}
	elf, err := unpack(ctx, image[start:end])
	if err != nil {
		return nil, fmt.Errorf("cannot unpack the kernel: %w", err)
	}
	if !bytes.HasPrefix(elf, []byte("\x7fELF")) {
		return nil, errors.New("the kernel's payload is not ELF")
	}
	return elf, nil
}

// unpack knows what Debian's kernels have been compressed with. The size that
// follows the payload's stream is ignored by all three.
func unpack(ctx context.Context, payload []byte) ([]byte, error) {
	var cmd *exec.Cmd
	switch {
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		cmd = exec.CommandContext(ctx, "xz", "-dc", "--single-stream")
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		// zstd has no such option: cut the size off.
		cmd = exec.CommandContext(ctx, "zstd", "-qdc")
		payload = payload[:len(payload)-4]
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, err
		}
		z.Multistream(false)
		return io.ReadAll(z)
	default:
		return nil, errors.New("unknown compression")
	}
	cmd.Stdin = bytes.NewReader(payload)
	return cmd.Output()
}
