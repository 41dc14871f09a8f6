package guestcli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	grantID = "3f0c2f4e-6f38-4a53-9f43-3c1b8d8f0a11"
	otherVM = "7d0a4b7e-1c55-4f0e-8d9c-2f6a1b3c4d5e"
)

func TestDelegate(t *testing.T) {
	b := ok(201, strings.Replace(grantJSON, `"narrowed":false`, `"narrowed":false,"max_uses":2`, 1))
	status, out, errs := run(t, b, "delegate", grantID, "--to", otherVM, "--narrow", "fs:ro:self:/a/b", "--ttl", "10m", "--max-uses", "2", "--max-depth", "0", "--label", "b")
	if status != 0 || !strings.Contains(out, "at most 2") {
		t.Errorf("%d %q %q", status, out, errs)
	}
	if b.path != "POST /v1/delegations" || b.received != `{"grant":"`+grantID+`","to":"`+otherVM+`","capability":"fs:ro:self:/a/b","ttl_seconds":600,"max_uses":2,"max_depth":0,"label":"b"}` {
		t.Errorf("asked %s %s", b.path, b.received)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("SECRET\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	status, out, errs = run(t, b, "delegate", "--token-file", file, "--to", otherVM, "-o", "json")
	if status != 0 || strings.Contains(out+errs, "SECRET") || b.received != `{"token":"SECRET","to":"`+otherVM+`"}` {
		t.Errorf("%d %q %q, sent %s", status, out, errs, b.received)
	}
}

func TestListTellsWhoDelegated(t *testing.T) {
	body := strings.Replace(grantJSON, `"narrowed":false`, `"narrowed":false,"max_uses":2,"uses":1,"from":"`+otherVM+`"`, 1)
	if status, out, _ := run(t, ok(200, `{"capabilities":[`+body+`]}`), "list"); status != 0 || !strings.Contains(out, "1 of 2") || !strings.Contains(out, otherVM) {
		t.Errorf("%d %q", status, out)
	}
}

func TestToken(t *testing.T) {
	b := ok(200, `{"grant":"`+grantID+`","token":"SECRET"}`)
	file := filepath.Join(t.TempDir(), "token")
	status, out, errs := run(t, b, "token", grantID, "--token-file", file)
	if status != 0 || strings.Contains(out+errs, "SECRET") || b.path != "POST /v1/capabilities/"+grantID+"/token" {
		t.Errorf("%d %q %q, asked %s", status, out, errs, b.path)
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	if status, _, _ := run(t, b, "token", grantID, "--token-file", file); status != ExitFailed {
		t.Errorf("wrote over an existing file: %d", status)
	}
	for _, args := range [][]string{{"--token"}, {"--token", "-o", "json"}} {
		if _, out, _ := run(t, b, append([]string{"token", grantID}, args...)...); !strings.Contains(out, "SECRET") {
			t.Errorf("%v printed %q", args, out)
		}
	}
}

func TestDelegateUsage(t *testing.T) {
	for name, args := range map[string][]string{
		"nothing":           {"delegate"},
		"no VM":             {"delegate", grantID},
		"a VM by name":      {"delegate", grantID, "--to", "work/mail"},
		"a path as a grant": {"delegate", "../requests", "--to", otherVM},
		"both":              {"delegate", grantID, "--token-file", "x", "--to", otherVM},
		"half a second":     {"delegate", grantID, "--to", otherVM, "--ttl", "500ms"},
		"token nowhere":     {"token", grantID},
		"token twice":       {"token", grantID, "--token", "--token-file", "x"},
		"token of a path":   {"token", "../../requests", "--token"},
	} {
		if status, out, errs := run(t, nil, args...); status != ExitUsage {
			t.Errorf("%s: exit %d\n%s%s", name, status, out, errs)
		}
	}
}
