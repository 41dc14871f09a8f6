// Command mkguest writes the tests' guest image and, with -vmlinux, the
// kernel in the form that boots soonest. It replaces an output only when it
// differs, so that what depends on it stays fresh.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"spectrum-os.org/broker/test/guest"
)

func main() {
	var o guest.Options
	flag.StringVar(&o.Busybox, "busybox", "/bin/busybox", "static busybox")
	flag.StringVar(&o.Modules, "modules", "", "lib/modules/<release> of the kernel")
	flag.StringVar(&o.Agent, "agent", "", "static spectrum-agent")
	flag.StringVar(&o.Exec, "exec", "", "static spectrum-test-exec")
	out := flag.String("o", "", "where to write the image")
	kernel := flag.String("kernel", "", "the distribution's kernel file, for -vmlinux")
	vmlinux := flag.String("vmlinux", "", "where to write the unpacked kernel")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o, *out, *kernel, *vmlinux); err != nil {
		fmt.Fprintln(os.Stderr, "mkguest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o guest.Options, out, kernel, vmlinux string) error {
	if vmlinux != "" {
		image, err := os.ReadFile(kernel)
		if err != nil {
			return err
		}
		if image, err = guest.Vmlinux(ctx, image); err != nil {
			return err
		}
		if err := replace(vmlinux, image); err != nil {
			return err
		}
	}
	if out == "" {
		return nil
	}
	var image bytes.Buffer
	if err := guest.Build(ctx, o, &image); err != nil {
		return err
	}
	return replace(out, image.Bytes())
}

func replace(file string, b []byte) error {
	if old, err := os.ReadFile(file); err == nil && bytes.Equal(old, b) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}
