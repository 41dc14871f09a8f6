package app

import (
	"strings"
	"testing"

	"spectrum-os.org/broker/agents/wire"
)

// FuzzParseMount: what is taken may be handed to mount(2).
func FuzzParseMount(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseMount(b)
		if err != nil {
			return
		}
		path := wire.MountPath(r.Label)
		if strings.Contains(strings.TrimPrefix(path, wire.MountRoot+"/"), "/") || r.Label[0] == '.' {
			t.Fatalf("mounts at %q", path)
		}
		if strings.ContainsAny(r.Tag, "/\x00 ") || r.Timeout() <= 0 {
			t.Fatalf("took %+v", r)
		}
	})
}

// FuzzMountinfo: only mounts of the agent's own corner are taken over.
func FuzzMountinfo(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, ok := parseMountinfo(string(b)); ok && m.Path != wire.MountPath(m.Label) {
			t.Fatalf("took over %+v", m)
		}
	})
}
