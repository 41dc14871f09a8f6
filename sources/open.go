package sources

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/capabilities"
)

// filesDir is all of a partition that grants can reach.
const filesDir = "files"

// Open holds the directory or regular file that rel names beneath the
// partition's files/. It never follows a symlink, crosses a mount point or
// leaves files/, whoever renames what meanwhile. Its errors wrap the sentinels
// of this package and say which component was refused.
func (p Partition) Open(rel capabilities.RelPath) (*Opened, error) {
	o, err := p.open(rel)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s of partition %s: %w", shown(rel.String()), p.ID, err)
	}
	return o, nil
}

func (p Partition) open(rel capabilities.RelPath) (*Opened, error) {
	if rel.IsZero() {
		return nil, fmt.Errorf("an empty path %w", ErrNotFound)
	}
	root, err := openTree(p.Dir, beneathFlags)
	if err != nil {
		return nil, err
	}
	defer root.close()
	files, err := root.sub(filesDir)
	if err != nil {
		return nil, err
	}
	defer files.close()
	f, st, err := files.path(rel.Rel())
	if err != nil {
		return nil, err
	}
	typ := st.Mode & unix.S_IFMT
	if typ != unix.S_IFDIR && typ != unix.S_IFREG {
		_ = f.Close()
		return nil, fmt.Errorf("%s is %s: it %w", shown(strings.TrimPrefix(rel.String(), "/")), typeName(st.Mode), ErrFileType)
	}
	return &Opened{file: f, isDir: typ == unix.S_IFDIR}, nil
}
