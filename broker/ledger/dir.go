package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// prepareDir makes the state directory where it is missing. One that others
// can write to is refused: they could put a file of theirs in a ledger's place.
func prepareDir(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("cannot make the state directory: %w", err)
		}
		if err := syncDir(filepath.Dir(filepath.Clean(dir))); err != nil {
			return fmt.Errorf("cannot make the state directory: %w", err)
		}
		info, err = os.Stat(dir)
	}
	if err != nil {
		return fmt.Errorf("cannot use the state directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: %s is not a directory", ErrUnsafeDir, dir)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, so that others can write to it", ErrUnsafeDir, dir, perm)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %s belongs to user %d", ErrUnsafeDir, dir, st.Uid)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("cannot keep others out of the state directory: %w", err)
	}
	return nil
}

// lockPatience is how long the lock of a broker that was killed may outlive it:
// a child that it had just forked holds it, too, until it executes its program.
const lockPatience = 2 * time.Second

// takeLock keeps a second broker out for as long as the file stays open, and
// tells it who is in.
func takeLock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the ledger: %w", err)
	}
	if err := flock(f, lockPatience); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot lock the ledger: %w", err)
		}
		// Between taking the lock and saying so it names nobody.
		who := "another process"
		pid, _ := io.ReadAll(io.LimitReader(f, 32))
		if _, err := strconv.Atoi(string(pid)); err == nil {
			who = "process " + string(pid)
		}
		return nil, fmt.Errorf("%w: %s holds %s", ErrLocked, who, f.Name())
	}
	if err := errors.Join(f.Truncate(0), writeAt(f, strconv.Itoa(os.Getpid()))); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot lock the ledger: %w", err), f.Close())
	}
	return f, nil
}

// flock fails with EWOULDBLOCK where somebody else has the lock all that time.
func flock(f *os.File, patience time.Duration) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
