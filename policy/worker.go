package policy

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"syscall"
	_ "time/tzdata" // a worker has no file system to read time zones from

	"github.com/open-policy-agent/opa/v1/ast"
)

// loadReply is the answer to opLoad.
type loadReply struct {
	Findings []Finding `json:"findings"` // with an error among them, nothing is loaded
}

// WorkerMain is the whole of the program when it runs as a policy worker. It
// returns the exit status when the broker closes the pipe; everything else that
// ends a worker is a signal or a crash, and meant to be.
func WorkerMain() int {
	if err := serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "policy worker:", err)
		return 1
	}
	return 0
}

func serve(in io.Reader, out io.Writer) error {
	// A worker is one of many and mostly idle: what it keeps counts for more
	// than what collecting costs.
	debug.SetGCPercent(30)
	r := bufio.NewReaderSize(in, 16<<10)
	first, err := readFrame(r, maxRequest)
	if err != nil {
		return err
	}
	var cfg sandboxConfig
	if first.op != opConfine {
		return errors.New("the first request must confine")
	}
	if err := json.Unmarshal(first.payload, &cfg); err != nil {
		return err
	}
	applied, err := confine(cfg)
	reply := confinement{Applied: applied}
	if err != nil {
		reply.Error = err.Error()
	}
	var buf []byte
	send := func(f frame) error {
		if len(f.payload) > maxReply {
			return fmt.Errorf("a reply of %d bytes is too long", len(f.payload))
		}
		buf = appendFrame(buf[:0], f)
		_, err := out.Write(buf)
		return err
	}
	payload, err := json.Marshal(reply)
	if err != nil {
		return err
	}
	if err := send(frame{op: opConfine, seq: first.seq, payload: payload}); err != nil {
		return err
	}
	if reply.Error != "" {
		return errors.New(reply.Error)
	}

	var w worker
	for {
		f, err := readFrame(r, maxRequest)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		payload, err := w.answer(f)
		if err != nil {
			return err
		}
		answered := f.op
		if w.spent() {
			answered |= opRetire
		}
		if err := send(frame{op: answered, seq: f.seq, payload: payload}); err != nil {
			return err
		}
	}
}

type worker struct {
	program  *program
	answered int
	retire   bool
}

func (w *worker) answer(f frame) ([]byte, error) {
	switch f.op {
	case opDecide, opExplain:
		if w.program == nil {
			return nil, errors.New("asked before a policy was loaded")
		}
		if f.op == opDecide {
			return marshalDecision(w.program.decide(f.payload)), nil
		}
		return marshalDecision(w.program.explain(f.payload)), nil
	case opTest:
		var req testRequest
		if err := json.Unmarshal(f.payload, &req); err != nil {
			return nil, err
		}
		return json.Marshal(runTests(req))
	case opLoad, opCheck:
		var src Sources
		if err := json.Unmarshal(f.payload, &src); err != nil {
			return nil, err
		}
		if f.op == opCheck {
			return json.Marshal(check(src))
		}
		var reply loadReply
		w.program, reply.Findings = compile(src)
		if w.program != nil {
			w.warm()
		}
		return json.Marshal(reply)
	}
	return nil, fmt.Errorf("cannot answer op %d", f.op)
}

// warm evaluates once, so that the first decision, which is timed, does not pay
// for what OPA sets up on first use; then gives back what compiling took.
func (w *worker) warm() {
	_ = w.program.evaluate(ast.ObjectTerm(), nil)
	debug.FreeOSMemory()
}

// spent tells, after every few answers, whether half of the CPU allowance is
// used: the other half is there to be killed in.
func (w *worker) spent() bool {
	if w.answered++; w.answered%256 == 0 && !w.retire {
		var usage syscall.Rusage
		if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
			w.retire = usage.Utime.Sec+usage.Stime.Sec > cpuSeconds/2
		}
	}
	return w.retire
}
