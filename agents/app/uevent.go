package app

import (
	"bytes"
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Uevents calls wake at each of the kernel's events about a virtio device, and
// whenever it may have missed one: at its start and where the kernel says that it
// lost some; gone tells that a device may have gone. It returns when ctx ends or
// the socket fails.
func Uevents(ctx context.Context, wake func(gone bool)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return err
	}
	// A file, so that the runtime polls it and closing it ends the read.
	f := os.NewFile(uintptr(fd), "uevent")
	defer f.Close()
	// Group 1 is the kernel's own; udev's copies are in group 2.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	wake(true)
	buf := make([]byte, 16<<10)
	for {
		n, err := f.Read(buf)
		if errors.Is(err, unix.ENOBUFS) {
			wake(true)
			continue
		}
		if err != nil {
			return err
		}
		if aboutVirtio(buf[:n]) {
			wake(goes(buf[:n]))
		}
	}
}

// aboutVirtio reads "ACTION@DEVPATH\0KEY=VALUE\0…".
func aboutVirtio(event []byte) bool {
	return bytes.Contains(event, []byte("\x00SUBSYSTEM=virtio\x00"))
}

// goes tells that the event is of a device, or its driver, that is taken away.
func goes(event []byte) bool {
	action, _, _ := bytes.Cut(event, []byte("@"))
	return string(action) == "remove" || string(action) == "unbind"
}
