/* Search in pages opened from disk: there browsers refuse a Worker, so its script runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = `<body><script>
        var postMessage = data => parent.postMessage(data, "*")
        var importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {
          var script = document.createElement("script")
          script.src = url
          script.onload = done
          document.body.append(script)
        })), Promise.resolve())
      </script><script src="${new URL(url, location)}"></script></body>`
      this.loaded = new Promise(done => { this.frame.onload = done })
      window.addEventListener("message", event => {
        if (event.source === this.frame.contentWindow) {
          const message = new MessageEvent("message", {data: event.data})
          this.dispatchEvent(message)
          if (this.onmessage) this.onmessage(message)
        }
      })
      document.body.append(this.frame)
    }
    postMessage(data) {
      // Not its postMessage: inside the frame that name now means the way back.
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data})))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
