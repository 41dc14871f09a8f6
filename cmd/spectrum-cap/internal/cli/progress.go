package cli

import (
	"fmt"
	"strings"
	"time"
)

// progress tells on a terminal that something takes longer than a second, and
// for how long by now. The returned function ends and erases it.
func (a *app) progress(format string, args ...any) (done func()) {
	if _, ok := terminal(a.host.Stderr); !ok {
		return func() {}
	}
	text := plain(fmt.Sprintf(format, args...))
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		start := time.Now()
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		shown := 0
		for {
			select {
			case <-stop:
				if shown > 0 {
					_, _ = fmt.Fprint(a.host.Stderr, "\r"+strings.Repeat(" ", shown)+"\r")
				}
				return
			case <-tick.C:
				line := fmt.Sprintf("%s … %d s", text, int(time.Since(start).Seconds()))
				shown = max(shown, len([]rune(line)))
				_, _ = fmt.Fprint(a.host.Stderr, "\r"+line)
			}
		}
	}()
	return func() {
		close(stop)
		<-ended
	}
}
