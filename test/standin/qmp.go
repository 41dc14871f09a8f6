package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// qmpEvent is what QEMU says unasked.
type qmpEvent struct {
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

type qmpReply struct {
	qmpEvent
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Greeting json.RawMessage `json:"QMP"`
}

// qmp is a QEMU monitor over one end of a socket pair. Commands are sent one
// at a time; events go to onEvent, in order, on the reading goroutine, which
// must therefore not send commands itself.
type qmp struct {
	conn    *net.UnixConn
	turn    sync.Mutex
	replies chan qmpReply
	closed  chan struct{}
	onEvent func(qmpEvent)
}

// qmpTimeout bounds a command. Emulation can be slow, but a monitor that
// says nothing for this long is stuck for good.
const qmpTimeout = 60 * time.Second

// newQMP takes over conn, and reads until QEMU closes it.
func newQMP(conn *net.UnixConn, onEvent func(qmpEvent)) *qmp {
	q := &qmp{
		conn: conn, onEvent: onEvent,
		replies: make(chan qmpReply, 1), closed: make(chan struct{}),
	}
	go q.read()
	return q
}

func (q *qmp) read() {
	defer close(q.closed)
	defer q.conn.Close()
	r := bufio.NewReader(q.conn)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		var reply qmpReply
		if err := json.Unmarshal(line, &reply); err != nil {
			return
		}
		switch {
		case reply.Greeting != nil:
		case reply.Event != "":
			q.onEvent(reply.qmpEvent)
		default:
			q.replies <- reply
		}
	}
}

// do sends a command, with a file to pass along or nil, and decodes what it
// returns into out unless that is nil.
func (q *qmp) do(command string, args any, file *os.File, out any) error {
	q.turn.Lock()
	defer q.turn.Unlock()
	message := map[string]any{"execute": command}
	if args != nil {
		message["arguments"] = args
	}
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var rights []byte
	if file != nil {
		rights = syscall.UnixRights(int(file.Fd()))
	}
	if _, _, err := q.conn.WriteMsgUnix(append(text, '\n'), rights, nil); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	timeout := time.NewTimer(qmpTimeout)
	defer timeout.Stop()
	select {
	case reply := <-q.replies:
		if reply.Error != nil {
			return &qmpError{command, reply.Error.Class, reply.Error.Desc}
		}
		if out != nil {
			return json.Unmarshal(reply.Return, out)
		}
		return nil
	case <-q.closed:
		return fmt.Errorf("%s: QEMU is gone", command)
	case <-timeout.C:
		// A late reply would be taken for the next command's.
		q.conn.Close()
		return fmt.Errorf("%s: QEMU does not answer", command)
	}
}

// qmpError is QEMU's refusal of a command.
type qmpError struct{ command, class, desc string }

func (e *qmpError) Error() string { return e.command + ": " + e.desc }

// giveFile hands QEMU a descriptor under a name that later commands use.
func (q *qmp) giveFile(name string, file *os.File) error {
	return q.do("getfd", map[string]any{"fdname": name}, file, nil)
}
