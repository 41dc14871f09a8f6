package sources

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

const (
	uuidFile    = "uuid"
	maxUUIDFile = 64
)

// readUUID reads a definition's uuid file: one random UUID (version 4) in
// lower case, with or without a newline.
func readUUID(def tree) (uuid.UUID, error) {
	b, err := def.read(uuidFile, maxUUIDFile)
	if err != nil {
		return uuid.Nil, err
	}
	text := strings.TrimSuffix(string(b), "\n")
	id, err := uuid.Parse(text)
	if err != nil || id.String() != text || id.Version() != 4 || id.Variant() != uuid.RFC4122 {
		return uuid.Nil, fmt.Errorf("%s %w: it must hold one random (version 4) UUID in lower case", uuidFile, ErrContents)
	}
	return id, nil
}

// writeUUID writes a definition's uuid file, whole or not at all, and never
// over one that is there: then it is fs.ErrExist.
func writeUUID(def tree, id uuid.UUID) (err error) {
	dir, err := reopen(def.dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	at := int(dir.Fd())
	temp := "." + uuidFile + "." + uuid.NewString()
	fd, err := retry(func() (int, error) {
		return unix.Openat(at, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	})
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), temp)
	defer func() {
		_ = f.Close()
		if err != nil {
			_ = unix.Unlinkat(at, temp, 0)
		}
	}()
	if _, err := f.WriteString(id.String() + "\n"); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	err = unix.Renameat2(at, temp, at, uuidFile, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// Not every file system can rename without replacing; those that
		// cannot can often link, which never replaces.
		if err = unix.Linkat(at, temp, at, uuidFile, 0); err == nil {
			err = unix.Unlinkat(at, temp, 0)
		}
	}
	if err != nil {
		return err
	}
	return dir.Sync()
}
