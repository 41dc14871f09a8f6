package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// BackupReport says what a backup holds.
type BackupReport struct {
	File   string
	Bytes  int64
	Events int
	Mark   Mark // which ledger, its epoch, and the newest event in the backup
}

// Backup writes the ledger in dir, as it is at one moment, into a new file that
// only its owner can read. It may run beside a broker, which goes on writing.
// The file appears under its name when it is whole, verified and durable. It
// holds every event and no private key.
func Backup(ctx context.Context, dir, file string) (r BackupReport, err error) {
	file, err = filepath.Abs(file)
	if err != nil {
		return r, err
	}
	if _, err := os.Lstat(file); err == nil {
		return r, fmt.Errorf("cannot write the backup %s: %w", file, ErrExists)
	}
	// Before the database: what is marked later is not there yet.
	w, err := newWitness(dir)
	if err == nil {
		err = w.gone(filepath.Join(dir, fileName))
	}
	if err != nil {
		return r, err
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".ledger-backup-*")
	if err != nil {
		return r, fmt.Errorf("cannot write the backup: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := copyInto(ctx, filepath.Join(dir, fileName), f); err != nil {
		return r, fmt.Errorf("cannot write the backup: %w", err)
	}
	report, err := verifyFile(ctx, f.Name(), w, nil)
	if err != nil {
		return r, fmt.Errorf("cannot read the backup again: %w", err)
	}
	if report.Broken != nil {
		return r, fmt.Errorf("there is nothing to back up: %w", report.Broken)
	}
	info, err := f.Stat()
	if err != nil {
		return r, err
	}
	if err := place(f.Name(), file); err != nil {
		return r, fmt.Errorf("cannot write the backup %s: %w", file, err)
	}
	return BackupReport{File: file, Bytes: info.Size(), Events: report.Events, Mark: report.Mark()}, nil
}

// copyInto copies the database at path, as one reader sees it, into the empty
// file f, durably. The copy is one file: what the source's log holds is in it.
func copyInto(ctx context.Context, path string, f *os.File) error {
	if info, err := os.Stat(path); err != nil {
		return err
	} else if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", ErrNotLedger, path)
	}
	s := &store{}
	defer s.close()
	if err := s.open(ctx, path, true, "", time.Time{}); err != nil {
		return fmt.Errorf("cannot open %s: %w", path, err)
	}
	if _, err := s.readers.ExecContext(ctx, "VACUUM INTO ?", f.Name()); err != nil {
		return err
	}
	// SQLite leaves it to its caller to make such a copy durable.
	return f.Sync()
}

// place gives a file its name, which nobody else may have, durably.
func place(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// A file system that cannot refuse to replace can at least link.
		err = os.Link(from, to)
	}
	if errors.Is(err, fs.ErrExist) {
		return ErrExists
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}
