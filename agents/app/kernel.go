package app

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/agents/wire"
)

// Linux is the [Kernel] of a real guest.
type Linux struct{}

// Mount mounts the virtio-fs device called tag.
func (Linux) Mount(tag, target string, readOnly bool) error {
	made := os.Mkdir(target, 0o755) == nil
	if !made {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	err := unix.Mount(tag, target, "virtiofs", flags, "")
	if err == nil {
		return nil
	}
	if made {
		_ = os.Remove(target)
	}
	// EINVAL: no device has the tag. ENODEV: the driver is not loaded yet.
	// ENOTCONN: the device that had the tag is just going away.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTCONN) {
		return ErrNoDevice
	}
	return fmt.Errorf("cannot mount %s: %w", tag, err)
}

// Unmount detaches, since a mount whose device is gone may be in use for
// ever.
func (Linux) Unmount(target string) error {
	err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Gone asks the file system for something that no cache answers.
func (Linux) Gone(target string) bool {
	var st unix.Statfs_t
	for {
		switch err := unix.Statfs(target, &st); {
		case errors.Is(err, unix.EINTR):
		case err == nil:
			// What answers is the directory beneath: somebody else unmounted it.
			return st.Type != unix.FUSE_SUPER_MAGIC
		default:
			return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) ||
				errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT)
		}
	}
}

// Mounted reads /proc/self/mountinfo.
func (Linux) Mounted() ([]wire.Mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []wire.Mount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if m, ok := parseMountinfo(lines.Text()); ok {
			out = append(out, m)
		}
	}
	return out, lines.Err()
}

// parseMountinfo reads one line, proc_pid_mountinfo(5), and says whether it
// is a mount of ours.
func parseMountinfo(line string) (wire.Mount, bool) {
	before, after, ok := strings.Cut(line, " - ")
	fields, source := strings.Fields(before), strings.Fields(after)
	if !ok || len(fields) < 6 || len(source) < 2 || source[0] != "virtiofs" {
		return wire.Mount{}, false
	}
	label := path.Base(fields[4])
	if fields[4] != wire.MountPath(label) || wire.CheckLabel(label) != nil {
		return wire.Mount{}, false
	}
	options := "," + fields[5] + ","
	return wire.Mount{Label: label, Tag: source[1], Path: fields[4], ReadOnly: strings.Contains(options, ",ro,")}, true
}
