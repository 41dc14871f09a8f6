//go:build race

package policy

// raceDetector multiplies memory, so that the watch on resident memory would
// kill honest workers.
const raceDetector = true
