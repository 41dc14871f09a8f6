package sources

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// OpenBoot opens what the VM starts from.
func (d Definition) OpenBoot() (*Boot, error) {
	b, err := d.openBoot()
	if err != nil {
		return nil, fmt.Errorf("cannot open what %s starts from: %w", d.spelt(), err)
	}
	return b, nil
}

func (d Definition) openBoot() (_ *Boot, err error) {
	def, err := d.tree()
	if err != nil {
		return nil, err
	}
	defer def.close()
	b := &Boot{}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	if b.Kernel, _, err = def.regular("vmlinux"); err != nil {
		return nil, err
	}
	if b.Initrd, _, err = def.regular("initrd"); err != nil && !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	names, err := diskNames(def)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		f, _, err := def.regular("blk/" + name)
		if err != nil {
			return nil, err
		}
		b.Disks = append(b.Disks, Disk{Name: name, File: f, ReadOnly: true})
		if err := checkRaw(f); err != nil {
			return nil, fmt.Errorf("blk/%s %w", name, err)
		}
	}
	return b, nil
}

// tree is the definition's directory: the built-in one as the host names it,
// a partition's resolved from its root.
func (d Definition) tree() (tree, error) {
	if d.BuiltIn() {
		return openTree(d.Dir, 0)
	}
	rel := filepath.Join(definitionsDir, d.Alias)
	rootDir := HostPath(filepath.Dir(filepath.Dir(filepath.Dir(string(d.Dir)))))
	if rootDir.Join(rel) != d.Dir {
		return tree{}, fmt.Errorf("%s %w: it is not %s of a partition", d.Dir, ErrEscapes, rel)
	}
	root, err := openTree(rootDir, beneathFlags)
	if err != nil {
		return tree{}, err
	}
	defer root.close()
	return root.sub(rel)
}

// checkRaw refuses image formats whose header can name other files of the
// host, which a VMM that guesses the format would open.
func checkRaw(f *os.File) error {
	head := make([]byte, 8)
	n, _ := f.ReadAt(head, 0)
	for _, magic := range []string{"QFI\xfb", "vhdxfile", "KDMV", "COWD", "QED\x00", "# Disk D", "conectix"} {
		if bytes.HasPrefix(head[:n], []byte(magic)) {
			return fmt.Errorf("%w: it is not a raw image", ErrContents)
		}
	}
	return nil
}
