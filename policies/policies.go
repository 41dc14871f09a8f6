// Package policies holds the Rego that is shipped: a library that every engine
// can import as data.spectrum.lib, and starter policies to copy.
//
// Its law: everything here is formatted, strict, tested, and passes the check
// that users' policies have to pass.
package policies

import (
	"embed"
	"io/fs"
	"path"
	"strings"
)

//go:embed lib host cautious permissive
var files embed.FS

// Starters are the names of the starter policies.
var Starters = []string{"host", "cautious", "permissive"}

// Library is the shipped library: file name → Rego, tests left out.
func Library() (map[string][]byte, error) { return read("lib", false) }

// WithTests is the folder of that name, tests included.
func WithTests(name string) (map[string][]byte, error) { return read(name, true) }

func read(dir string, tests bool) (map[string][]byte, error) {
	entries, err := fs.ReadDir(files, dir)
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".rego") || (!tests && strings.HasSuffix(e.Name(), "_test.rego")) {
			continue
		}
		text, err := fs.ReadFile(files, path.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		out[e.Name()] = text
	}
	return out, nil
}
