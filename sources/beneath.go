package sources

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// beneathFlags are how every name in a partition is resolved.
const beneathFlags = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// A tree is a directory beneath which names are resolved: a partition's, with
// beneathFlags, or the host's own, as the kernel does by default.
type tree struct {
	dir     *os.File // O_PATH
	resolve uint64
}

// openTree holds a directory of the host's own. The way to it is trusted: the
// host named it.
func openTree(dir HostPath, resolve uint64) (tree, error) {
	flags := unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	if resolve != 0 {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := retry(func() (int, error) { return unix.Open(string(dir), flags, 0) })
	if err != nil {
		return tree{}, fmt.Errorf("%s %w", dir, reasonOf(err))
	}
	return tree{dir: os.NewFile(uintptr(fd), string(dir)), resolve: resolve}, nil
}

func (t tree) close() { _ = t.dir.Close() }

// path opens rel as O_PATH: that has no effect on what is there. It must not
// say O_NOFOLLOW: with that, the kernel opens a last component that is a
// symlink as itself, RESOLVE_NO_SYMLINKS or not.
func (t tree) path(rel string) (*os.File, *unix.Stat_t, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: t.resolve}
	fd, err := retry(func() (int, error) { return unix.Openat2(int(t.dir.Fd()), rel, &how) })
	if err != nil {
		return nil, nil, t.explain(rel, err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(t.dir.Name(), rel))
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = f.Close()
		return nil, nil, fmt.Errorf("%s %w", shown(rel), reasonOf(err))
	}
	return f, &st, nil
}

// sub is the directory rel as a tree of its own.
func (t tree) sub(rel string) (tree, error) {
	f, st, err := t.path(rel)
	if err != nil {
		return tree{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		_ = f.Close()
		return tree{}, fmt.Errorf("%s %w", shown(rel), ErrNotDirectory)
	}
	return tree{dir: f, resolve: t.resolve}, nil
}

// regular opens the regular file rel for reading.
func (t tree) regular(rel string) (*os.File, int64, error) {
	f, st, err := t.path(rel)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, 0, fmt.Errorf("%s is %s: %w", shown(rel), typeName(st.Mode), ErrFileType)
	}
	r, err := reopen(f, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, 0, fmt.Errorf("%s %w", shown(rel), reasonOf(err))
	}
	return r, st.Size, nil
}

// read is the whole of the regular file rel, which may have at most limit
// bytes, however much it grows meanwhile.
func (t tree) read(rel string, limit int64) ([]byte, error) {
	f, size, err := t.regular(rel)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tooLarge := fmt.Errorf("%s %w: at most %d bytes", shown(rel), ErrTooLarge, limit)
	if size > limit {
		return nil, tooLarge
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s %w", shown(rel), reasonOf(err))
	}
	if int64(len(b)) > limit {
		return nil, tooLarge
	}
	return b, nil
}

// names are the entries of the tree's directory, unordered. More than limit
// are refused before they are read.
func (t tree) names(limit int) ([]string, error) {
	d, err := reopen(t.dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("%s %w", t.dir.Name(), reasonOf(err))
	}
	defer d.Close()
	names, err := d.Readdirnames(limit + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s %w", t.dir.Name(), reasonOf(err))
	}
	if len(names) > limit {
		return nil, fmt.Errorf("%s %w: at most %d entries", t.dir.Name(), ErrTooMany, limit)
	}
	return names, nil
}

// reopen opens what f holds as O_PATH. The link in /proc names the held inode
// and no path, so nobody can exchange it.
func reopen(f *os.File, flags int) (*os.File, error) {
	fd, err := retry(func() (int, error) {
		return unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// retry calls open again where the kernel says that it was disturbed. A guest
// that renames directories all the time could make that last for ever.
func retry(open func() (int, error)) (int, error) {
	const tries = 64
	for i := 0; ; i++ {
		fd, err := open()
		if err == nil {
			return fd, nil
		}
		if i == tries || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return -1, err
		}
	}
}

// explain says which component of rel the error is about. It looks again, so
// in a race it may find nothing wrong any more; the refusal stands.
func (t tree) explain(rel string, cause error) error {
	reason := reasonOf(cause)
	if t.resolve == 0 {
		return fmt.Errorf("%s %w", shown(rel), reason)
	}
	at, done := int(t.dir.Fd()), func() {}
	components := strings.Split(rel, "/")
	for i, name := range components {
		so := shown(strings.Join(components[:i+1], "/"))
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: t.resolve &^ unix.RESOLVE_NO_SYMLINKS}
		fd, err := retry(func() (int, error) { return unix.Openat2(at, name, &how) })
		done()
		if err != nil {
			return fmt.Errorf("%s %w", so, reasonOf(err))
		}
		at, done = fd, func() { _ = unix.Close(fd) }
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			break
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			done()
			return fmt.Errorf("%s %w", so, ErrSymlink)
		}
		if i < len(components)-1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			done()
			return fmt.Errorf("%s %w", so, ErrNotDirectory)
		}
	}
	done()
	return fmt.Errorf("%s %w", shown(rel), reason)
}

// reasonOf is the sentinel that stands for what the kernel said.
func reasonOf(err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return err
	}
	switch errno {
	case unix.ENOENT:
		return ErrNotFound
	case unix.ELOOP:
		return ErrSymlink
	case unix.EXDEV:
		return ErrMountPoint
	case unix.ENOTDIR:
		return ErrNotDirectory
	case unix.EACCES, unix.EPERM:
		return ErrDenied
	case unix.EAGAIN:
		return ErrChanging
	case unix.EIO, unix.ENODEV, unix.ENXIO, unix.ESTALE, unix.ENOTCONN, unix.ESHUTDOWN:
		return fmt.Errorf("%w (%w)", ErrUnavailable, errno)
	case unix.ENAMETOOLONG:
		return fmt.Errorf("%w: its name is too long for the file system", ErrNotFound)
	}
	return errno
}

// typeName names a type of file.
func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFBLK:
		return "a block device"
	case unix.S_IFCHR:
		return "a character device"
	}
	return "of an unknown type"
}
