package arrows

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "spectrum-os.org/broker/"

// arrows is the picture of the parts, by folder: what each may import of this
// module, and what of others' it must not reach even through somebody else.
// The first row that matches a package counts. "clock" may be read anywhere.
var arrows = []struct {
	folder string
	may    []string
	never  []string
}{
	{"capabilities", nil, []string{"net/http", "os/exec"}},
	{"clock", []string{"capabilities"}, nil},
	{"failpoint", nil, []string{"net/http", "os/exec"}},
	{"policies", nil, nil},
	{"policy", []string{"policy", "policies", "capabilities"}, []string{module + "broker/ledger", "modernc.org/sqlite"}},
	{"sources", []string{"capabilities"}, []string{opa, module + "broker/ledger"}},
	{"vmm/shim", []string{"vmm", "capabilities", "failpoint"}, []string{opa, module + "broker", "modernc.org/sqlite"}},
	{"vmm", []string{"vmm", "capabilities"}, []string{opa, module + "broker", "modernc.org/sqlite"}},
	{"agents", []string{"agents", "capabilities"}, []string{opa, module + "broker", "modernc.org/sqlite", "github.com/google/nftables", "github.com/vishvananda/netlink"}},
	{"broker/ledger", []string{"broker/ledger", "capabilities", "failpoint"}, []string{opa}},
	{"broker/keys", []string{"broker/ledger", "capabilities", "failpoint"}, []string{opa}},
	{"broker/reconcile", []string{"broker/reconcile", "broker/ledger", "capabilities", "failpoint"}, []string{opa}},
	{"broker/api", []string{"broker/api", "capabilities"}, []string{opa, "modernc.org/sqlite"}},
	{"broker/applyfs", []string{"broker/applyfs", "broker/reconcile", "broker/ledger", "sources", "vmm", "agents/wire", "capabilities", "failpoint"}, []string{opa}},
	{"broker", []string{"broker", "policy", "policies", "sources", "vmm", "agents/wire", "capabilities", "failpoint"}, nil},
	{"cmd/spectrum-agent", []string{"agents"}, []string{opa, module + "broker", "modernc.org/sqlite"}},
	{"cmd/spectrum-shim", []string{"vmm", "capabilities"}, []string{opa, module + "broker", "modernc.org/sqlite"}},
	{"cmd", []string{"cmd", "broker", "policy", "policies", "sources", "vmm", "agents", "capabilities"}, nil},
	{"docs", []string{"cmd", "broker", "policy", "agents", "capabilities"}, nil},
	{"test", []string{""}, nil},
}

const opa = "github.com/open-policy-agent/opa"

type pkg struct {
	ImportPath    string
	Imports, Deps []string
}

func TestArrows(t *testing.T) {
	for _, p := range list(t) {
		folder := strings.TrimPrefix(p.ImportPath, module)
		i := slices.IndexFunc(arrows, func(a struct {
			folder     string
			may, never []string
		},
		) bool {
			return under(folder, a.folder)
		})
		if i < 0 {
			t.Errorf("%s is in no part: give it a row", folder)
			continue
		}
		for _, imported := range p.Imports {
			to, ours := strings.CutPrefix(imported, module)
			if ours && !may(arrows[i].may, to) {
				t.Errorf("%s imports %s: that arrow turns back", folder, to)
			}
		}
		for _, dep := range p.Deps {
			for _, n := range arrows[i].never {
				if under(dep, n) {
					t.Errorf("%s reaches %s, which %s must not", folder, dep, arrows[i].folder)
				}
			}
		}
	}
}

func may(allowed []string, to string) bool {
	if to == "clock" {
		return true
	}
	return slices.ContainsFunc(allowed, func(folder string) bool { return folder == "" || under(to, folder) })
}

func under(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps", "../../...")
	out, err := cmd.Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}
