//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Enabled says whether this program was built with the tag.
const Enabled = true

// ArmVar names the environment variable that arms failpoints: a list, separated
// by commas, of label:count:action. The action is taken at the count-th hit of
// the label in one process, and is "kill" (SIGKILL to itself) or
// "sleep=DURATION". Processes inherit it, so that it reaches shims and launchers.
const ArmVar = "SPECTRUM_FAILPOINTS"

// SeenVar names a file to which every process appends each label that it hits,
// once, one a line, and "LABEL killed" where it dies of it.
const SeenVar = "SPECTRUM_FAILPOINTS_SEEN"

// arm is what is to happen at a label.
type arm struct {
	count int // hits that are left
	sleep time.Duration
	kill  bool
}

var state = struct {
	once sync.Once
	mu   sync.Mutex
	arms map[string]*arm
	seen *os.File // nil: nobody asked
	told map[string]bool
}{told: map[string]bool{}}

// Hit says that the program is at the step of this name.
func Hit(label string) {
	state.once.Do(read)
	a := reached(label)
	switch {
	case a == nil:
	case a.kill:
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
		// Not one step further, also as the first process of a PID namespace,
		// which no signal of its own ends.
		syscall.Exit(128 + int(syscall.SIGKILL))
	default:
		time.Sleep(a.sleep)
	}
}

// reached is what is armed for this hit, or nil.
func reached(label string) *arm {
	state.mu.Lock()
	defer state.mu.Unlock()
	if state.seen != nil && !state.told[label] {
		state.told[label] = true
		_, _ = state.seen.WriteString(label + "\n")
	}
	a := state.arms[label]
	if a == nil {
		return nil
	}
	if a.count--; a.count != 0 {
		return nil
	}
	if a.kill && state.seen != nil {
		_, _ = state.seen.WriteString(label + " killed\n")
	}
	return a
}

func read() {
	arms, err := parse(os.Getenv(ArmVar))
	if err != nil {
		// A test that arms nothing by mistake would pass for the wrong reason.
		fmt.Fprintf(os.Stderr, "%s: %v\n", ArmVar, err)
		os.Exit(2)
	}
	state.arms = arms
	if path := os.Getenv(SeenVar); path != "" {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", SeenVar, err)
			os.Exit(2)
		}
		state.seen = f
	}
}

func parse(list string) (map[string]*arm, error) {
	arms := map[string]*arm{}
	if list == "" {
		return arms, nil
	}
	for item := range strings.SplitSeq(list, ",") {
		parts := strings.Split(item, ":")
		if len(parts) != 3 || parts[0] == "" {
			return nil, fmt.Errorf("%q is not label:count:action", item)
		}
		count, err := strconv.Atoi(parts[1])
		if err != nil || count < 1 {
			return nil, fmt.Errorf("the count of %q is not a number from 1", item)
		}
		a := &arm{count: count}
		duration, sleeps := strings.CutPrefix(parts[2], "sleep=")
		switch {
		case sleeps:
			if a.sleep, err = time.ParseDuration(duration); err != nil || a.sleep < 0 {
				return nil, fmt.Errorf("%q is no time to sleep, such as 200ms", duration)
			}
		case parts[2] == "kill":
			a.kill = true
		default:
			return nil, fmt.Errorf("the action of %q is neither kill nor sleep=DURATION", item)
		}
		if arms[parts[0]] != nil {
			return nil, fmt.Errorf("%q is armed twice", parts[0])
		}
		arms[parts[0]] = a
	}
	return arms, nil
}
