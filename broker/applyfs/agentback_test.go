package applyfs

import (
	"os"
	"testing"
)

// An agent that comes back is told what is shared, whatever has its name by
// then: the share is the descriptor that was opened once.
func TestAgentBackAfterARename(t *testing.T) {
	for name, change := range map[string]func(w *world) error{
		"removed": func(w *world) error { return os.Remove(w.path("docs", "one")) },
		"a directory": func(w *world) error {
			_ = os.Remove(w.path("docs", "one"))
			return os.Mkdir(w.path("docs", "one"), 0o755)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.fake()
			a := &goodAgent{}
			w.agent = a
			o := w.object("one", 1, w.capability("/docs/one", "read"))
			if _, err := w.apply(o); err != nil {
				t.Fatal(err)
			}
			if err := change(w); err != nil {
				t.Fatal(err)
			}
			if err := New(w, mountTime).AgentBack(t.Context(), o); err != nil {
				t.Errorf("the share is there and its agent is not told: %v", err)
			}
			if seen := a.seen(); len(seen) == 2 && seen[0] != seen[1] {
				t.Errorf("the agent was told %+v, then %+v", seen[0], seen[1])
			}
		})
	}
}
