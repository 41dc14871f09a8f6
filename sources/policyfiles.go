package sources

import (
	"fmt"
	"slices"
	"strings"
)

// Bounds of a directory of policies.
const (
	MaxPolicyFiles = 256
	MaxPolicyFile  = 1 << 20
	MaxPolicyTotal = 8 << 20
)

const policyDir = "svc/policy"

// PolicyDir is where the partition's policies are.
func (p Partition) PolicyDir() HostPath { return p.Dir.Join(policyDir) }

// ReadPolicy reads the partition's policies: every *.rego, and data.json or
// data.yaml if there is one. A partition without the directory is ErrNotFound.
func (p Partition) ReadPolicy() (files map[string][]byte, data []byte, dataName string, err error) {
	root, err := openTree(p.Dir, beneathFlags)
	if err == nil {
		defer root.close()
		var dir tree
		if dir, err = root.sub(policyDir); err == nil {
			defer dir.close()
			files, data, dataName, err = readPolicy(dir)
		}
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("cannot read the policies of partition %s: %w", p.ID, err)
	}
	return files, data, dataName, nil
}

// ReadPolicyDir reads a directory of policies of the host's own, with the same
// bounds. The way to the directory may be a symlink, the files in it may not.
func ReadPolicyDir(dir HostPath) (files map[string][]byte, data []byte, dataName string, err error) {
	t, err := openTree(dir, 0)
	if err == nil {
		defer t.close()
		t.resolve = beneathFlags
		files, data, dataName, err = readPolicy(t)
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("cannot read the policies in %s: %w", dir, err)
	}
	return files, data, dataName, nil
}

func readPolicy(dir tree) (files map[string][]byte, data []byte, dataName string, err error) {
	names, err := dir.names(maxEntries)
	if err != nil {
		return nil, nil, "", err
	}
	slices.Sort(names)
	files = map[string][]byte{}
	left := int64(MaxPolicyTotal)
	for _, name := range names {
		isData := name == "data.json" || name == "data.yaml"
		if strings.HasPrefix(name, ".") || !isData && !strings.HasSuffix(name, ".rego") {
			continue
		}
		switch {
		case !printable(name):
			return nil, nil, "", fmt.Errorf("%s %w: its name has control characters", shown(name), ErrContents)
		case isData && dataName != "":
			return nil, nil, "", fmt.Errorf("%s %w: there is %s too", name, ErrContents, dataName)
		case !isData && len(files) == MaxPolicyFiles:
			return nil, nil, "", fmt.Errorf("%w: at most %d policies", ErrTooMany, MaxPolicyFiles)
		}
		b, err := dir.read(name, MaxPolicyFile)
		if err != nil {
			return nil, nil, "", err
		}
		if left -= int64(len(b)); left < 0 {
			return nil, nil, "", fmt.Errorf("%w: at most %d bytes in all", ErrTooLarge, MaxPolicyTotal)
		}
		if isData {
			data, dataName = b, name
		} else {
			files[name] = b
		}
	}
	return files, data, dataName, nil
}
