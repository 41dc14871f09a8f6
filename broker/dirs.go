package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ownDir makes a directory, or makes sure that the one that is there is the
// broker's alone to change: whoever else could would decide what it trusts.
func ownDir(dir string, mode os.FileMode) error {
	if err := makeDir(filepath.Clean(dir), mode); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is a symbolic link; name the directory itself", dir)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d; give it to user %d, which the broker runs as", dir, st.Uid, os.Geteuid())
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s is writable by others (mode %04o); run `chmod go-w %s`", dir, st.Mode&0o7777, dir)
	}
	return nil
}

// makeDir makes a directory, and those above it, durably: what is made durable
// inside of one that a power cut takes away is gone with it.
func makeDir(dir string, mode os.FileMode) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	above := filepath.Dir(dir)
	if err := makeDir(above, mode); err != nil {
		return err
	}
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(above)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
